"""Is a conversion right? All bytes of a round trip; Megatron's logits against transformers'."""

import subprocess
import sys
from pathlib import Path

import torch

from megatron_dft.hf.families import optional_tensors
from megatron_dft.hf.safetensors_io import Reader
from megatron_dft.hf.source import HFCheckpoint


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


def compare_logits(checkpoint: HFCheckpoint, torch_dist: Path) -> None:
    """Run `megatron_dft.verify` in a process of its own: it chooses CPU or GPU for all of Megatron.

    Raises ValueError when the logits differ.
    """
    command = [sys.executable, "-m", "megatron_dft.verify", str(checkpoint.path), str(torch_dist)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"--verify: {torch_dist} and {checkpoint.path} do not compute the same")
