"""What a drift report needs of a checkpoint: names, shapes and any run of a tensor's elements."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """Shape (global, never a shard's) and stored dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorReader(Protocol):
    """One tensor, open for reading; used by one thread."""

    def read(self, start: int, out: torch.Tensor) -> None:
        """Copy elements [start, start + len(out)) of the row-major tensor into `out`.

        `out`: 1-D, contiguous, of the tensor's stored dtype; overwritten.
        """


class Checkpoint(Protocol):
    """A directory of weights. `open` may be called from several threads."""

    path: Path
    tensors: dict[str, TensorInfo]

    def open(self, name: str) -> TensorReader: ...


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory, {} where there is none."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory with safetensors, or a Megatron torch_dist checkpoint.

    A torch_dist checkpoint is the iteration's directory, or the directory given to `--save` (its
    tracker file then names the iteration). Raises ValueError (one line) for anything else.
    """
    from megatron_dft.drift.safetensors_reader import SafetensorsCheckpoint
    from megatron_dft.drift.torch_dist_reader import TorchDistCheckpoint, iteration_directory

    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a directory; give a Hugging Face model directory (config.json and "
            "*.safetensors) or a torch_dist checkpoint"
        )
    iteration = iteration_directory(path)
    if iteration is not None:
        return TorchDistCheckpoint(iteration)
    return SafetensorsCheckpoint(path)
