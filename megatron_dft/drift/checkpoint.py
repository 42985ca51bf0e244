"""What a drift report needs of a checkpoint: names, shapes and any run of a tensor's elements."""

from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_dft.storage.files import read_json_object
from megatron_dft.storage.tensor_info import TensorInfo

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    return read_json_object(file)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory with safetensors, or a Megatron torch_dist checkpoint.

    A torch_dist checkpoint is the iteration's directory, or the directory given to `--save` (its
    tracker file then names the iteration). Raises ValueError (one line) for anything else.
    """
    from megatron_dft.drift.safetensors_reader import SafetensorsCheckpoint
    from megatron_dft.drift.torch_dist_reader import TorchDistCheckpoint, iteration_of

    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a directory; give a Hugging Face model directory (config.json and "
            "*.safetensors) or a torch_dist checkpoint"
        )
    iteration = iteration_of(path)
    if iteration is not None:
        return TorchDistCheckpoint(iteration)
    return SafetensorsCheckpoint(path)
