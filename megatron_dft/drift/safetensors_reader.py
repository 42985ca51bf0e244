"""A Hugging Face directory's tensors for drift: any run of elements into the caller's buffer."""

import os
from pathlib import Path

import torch

from megatron_dft.storage.model_files import read_directory
from megatron_dft.storage.pread import fill
from megatron_dft.storage.tensor_info import TensorInfo


class SafetensorsCheckpoint:
    """All tensors of a directory's safetensors shards. Raises ValueError on a damaged shard."""

    def __init__(self, path: Path):
        self.path = path
        self._stored = read_directory(path)
        self.tensors: dict[str, TensorInfo] = dict(self._stored)
        files = {info.file for info in self._stored.values()}
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in files}

    def open(self, name: str) -> "_Reader":
        info = self._stored[name]
        return _Reader(self._descriptors[info.file], info.offset, info.file)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class _Reader:
    def __init__(self, descriptor: int, offset: int, file: Path):
        self._descriptor, self._offset, self._file = descriptor, offset, file

    def read(self, start: int, out: torch.Tensor) -> None:
        position = self._offset + start * out.element_size()
        if not fill(self._descriptor, out, position):
            raise ValueError(
                f"{self._file}: no data behind byte {position} (truncated while read); the file is "
                "damaged or incomplete, copy it again"
            )
