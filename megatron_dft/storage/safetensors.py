"""Read slices of safetensors files and write such files tensor by tensor.

The `safetensors` package maps whole files (their pages count as this process's memory, and a file
that shrinks underneath ends the process with SIGBUS) and writes a file only from a complete dict.
Here a read is a `preadv` of the wanted bytes and a write is one tensor at its offset, so neither
direction ever holds more than one tensor. Format: 8 bytes little-endian header length, a JSON
header, the data.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dft.storage.dtypes import DTYPES, NAMES
from megatron_dft.storage.overlap import WriteBehind
from megatron_dft.storage.pread import fill

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BLOCK_BYTES = 32 * 2**20
_WRITE_BYTES = 8 * 2**20  # so that a large tensor too is written behind window by window


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `file`, global `shape`, `dtype`, byte `offset` of its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name; reads the header alone.

    Raises ValueError when the header is not JSON, a dtype is unknown, a tensor's byte range does
    not fit its shape, or the file is shorter or longer than its header says (a truncated download).
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file}: not a whole safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            end = 0
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
                begin, stop = entry["data_offsets"]
                info = TensorInfo(
                    file, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + begin
                )
                if begin < 0 or any(n < 0 for n in info.shape) or stop - begin != info.nbytes:
                    raise ValueError(f"tensor {name!r}: byte range and shape disagree")
                end = max(end, stop)
                tensors[name] = info
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: malformed safetensors header: {error}") from None
    if size != 8 + length + end:
        raise ValueError(
            f"{file}: {size} bytes, but its header describes {8 + length + end} (truncated or "
            "corrupt); fetch it again"
        )
    return tensors


class Reader:
    """Copies regions of tensors into tensors in memory; keeps each file open once."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, file: Path) -> int:
        if file not in self._fds:
            self._fds[file] = os.open(file, os.O_RDONLY)
        return self._fds[file]

    def read_into(self, info: TensorInfo, start: int, rows: torch.Tensor) -> None:
        """Rows from `start` on into `rows` (CPU, contiguous), converted to its dtype."""
        row_bytes = info.nbytes // max(info.shape[0], 1)
        if rows.dtype == info.dtype:
            self._fill(info, start * row_bytes, rows)
            return
        for first, block in self.blocks(info, start, start + rows.shape[0]):
            rows.narrow(0, first - start, block.shape[0]).copy_(block)

    def blocks(self, info: TensorInfo, start: int, stop: int) -> Iterable[tuple[int, torch.Tensor]]:
        """Rows `start:stop` (along axis 0) in blocks of at most 32 MiB: (first row, rows)."""
        row_shape = info.shape[1:]
        row_bytes = info.nbytes // max(info.shape[0], 1)
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        for first in range(start, stop, step):
            rows = torch.empty((min(step, stop - first), *row_shape), dtype=info.dtype)
            self._fill(info, first * row_bytes, rows)
            yield first, rows

    def _fill(self, info: TensorInfo, begin: int, rows: torch.Tensor) -> None:
        if not fill(self._fd(info.file), rows, info.offset + begin):
            raise ValueError(f"{info.file}: its end is gone; it shrank while being read")


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
