"""Write a safetensors file tensor by tensor, or region by region.

The `safetensors` package writes a file only from a complete dict. Here a write goes to its offset,
so no more than one tensor is ever held.
"""

import json
import os
from pathlib import Path

import torch

from megatron_dft.storage.dtypes import NAMES
from megatron_dft.storage.overlap import WriteBehind

_WRITE_BYTES = 8 * 2**20  # so that a large tensor too is written behind window by window


class Writer:
    """Writes one safetensors file; every tensor's name, shape and dtype are known in advance."""

    def __init__(self, file: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            nbytes = dtype.itemsize
            for n in shape:
                nbytes *= n
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end + nbytes],
            }
            self._offsets[name] = (end, nbytes)
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts 8-byte aligned, as the format asks
        self.file = file
        self._base = 8 + len(text)
        self._contents = tensors
        self._left = {name: nbytes for name, (_, nbytes) in self._offsets.items()}
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._behind = WriteBehind(self._fd)
        os.write(self._fd, len(text).to_bytes(8, "little") + text)

    def dtype(self, name: str) -> torch.dtype:
        return self._contents[name][1]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the whole tensor (CPU, contiguous, of the announced dtype and size)."""
        nbytes = self._offsets[name][1]
        if tensor.nbytes != nbytes:
            raise ValueError(f"{name}: {tensor.nbytes} bytes to write where {nbytes} are announced")
        self._put(name, 0, tensor.reshape(-1))

    def write_region(self, name: str, row: int, column: int, region: torch.Tensor) -> None:
        """Write part of a tensor: `region` (CPU, announced dtype) from `row` and `column` on.

        Regions must not overlap: what is written is counted, and `close` wants every element.
        """
        shape, dtype = self._contents[name]
        width = self._offsets[name][1] // max(shape[0], 1)  # bytes a row
        if region.dim() < 2 or region.shape[1:] == tuple(shape[1:]):
            self._put(name, row * width, region.contiguous().reshape(-1))
            return
        for i, part in enumerate(region.contiguous()):
            self._put(name, (row + i) * width + column * dtype.itemsize, part)

    def _put(self, name: str, begin: int, flat: torch.Tensor) -> None:
        view = memoryview(flat.view(torch.uint8).numpy())
        self._left[name] -= len(view)
        offset = self._base + self._offsets[name][0] + begin
        while view:
            count = os.pwrite(self._fd, view[:_WRITE_BYTES], offset)
            view, offset = view[count:], offset + count
            self._behind.wrote(count)

    def close(self) -> None:
        """Flush to the disk; raises ValueError when an announced tensor is not whole."""
        missing = [name for name, left in self._left.items() if left != 0]
        if missing:
            raise ValueError(f"{self.file.name}: not written, or not once: {missing[:3]}")
        self._behind.close()
        os.close(self._fd)

    def abandon(self) -> None:
        self._behind.abandon()
        os.close(self._fd)
