"""Is a conversion right? All bytes of a round trip."""

import torch

from megatron_dft.hf.families import optional_tensors
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.safetensors import Reader


def compare_bytes(expected: HFCheckpoint, got: HFCheckpoint) -> None:
    """Raise ValueError naming the first tensor that is missing, extra, or differs in a bit."""
    optional = optional_tensors(expected)
    names = set(expected.tensors) - optional
    if names != set(got.tensors) - optional:
        name = sorted(names ^ (set(got.tensors) - optional))[0]
        raise ValueError(f"{got.path}: tensor {name!r} is in only one of the two checkpoints")
    with Reader() as reader:
        for name in sorted(names):
            a, b = expected.tensors[name], got.tensors[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype) or not all(
                torch.equal(x.view(torch.uint8), y.view(torch.uint8))
                for (_, x), (_, y) in zip(
                    reader.blocks(a, 0, a.shape[0]), reader.blocks(b, 0, b.shape[0]), strict=True
                )
            ):
                raise ValueError(f"{got.path}: tensor {name!r} differs from {expected.path}")
