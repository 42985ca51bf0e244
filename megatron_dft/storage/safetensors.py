"""Check and read safetensors files by offset.

The `safetensors` package maps whole files: their pages count as this process's memory, and a file
that shrinks underneath ends the process with SIGBUS. Here a read is a `preadv` of the wanted bytes.
Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a
JSON header, the data.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dft.storage.dtypes import DTYPES
from megatron_dft.storage.pread import fill
from megatron_dft.storage.tensor_info import TensorInfo

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor of a safetensors file: its data lies at byte `offset` of `file`, row by row."""

    file: Path
    offset: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; reads the header alone.

    Raises ValueError when the header is not JSON, an entry is malformed, its dtype unknown, its
    byte range not what its shape needs, two ranges overlap, or the file is shorter or longer than
    its header says (a truncated download).
    """
    size = file.stat().st_size
    with open(file, "rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file}: {size} bytes are no safetensors file (header of {length} bytes); fetch "
                "it again"
            )
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("expected a JSON object")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{file}: the safetensors header is not JSON (malformed safetensors header): {reason}"
        ) from None
    header.pop("__metadata__", None)
    try:
        tensors = {name: _entry(file, 8 + length, name, entry) for name, entry in header.items()}
        end = _end_of_data(tensors, 8 + length)
    except ValueError as error:
        raise ValueError(f"{file}: malformed safetensors header: {error}") from None
    if size != end:
        how = "truncated" if size < end else "corrupt"
        raise ValueError(
            f"{file}: {size} bytes, but its header describes {end} ({how}); fetch it again"
        )
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int to isinstance


def _entry(file: Path, data: int, name: str, entry: Any) -> StoredTensor:
    """One line of the header; `data` is the file's first byte behind it."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of tensor {name!r} is no JSON object")
    kind, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"tensor {name!r} is stored as {str(kind)[:40]}, which is not supported")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"tensor {name!r} has the shape {str(shape)[:60]}, expected sizes")
    if not isinstance(place, list) or len(place) != 2 or not all(map(_is_size, place)):
        raise ValueError(f"tensor {name!r} has the data_offsets {str(place)[:60]}, expected two")
    info = StoredTensor(tuple(shape), DTYPES[kind], file, data + place[0])
    if place[1] - place[0] != info.nbytes:
        raise ValueError(
            f"tensor {name!r} has {place[1] - place[0]} bytes, its shape needs {info.nbytes}"
        )
    return info


def _end_of_data(tensors: dict[str, StoredTensor], data: int) -> int:
    """Where the last tensor ends; they follow each other without gap or overlap, as the format
    asks."""
    end = data
    for name, info in sorted(tensors.items(), key=lambda t: (t[1].offset, t[1].nbytes)):
        if info.offset != end:
            what = "overlaps the one before" if info.offset < end else "leaves a gap before it"
            raise ValueError(f"tensor {name!r} {what}")
        end += info.nbytes
    return end


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

    def read_into(self, info: StoredTensor, start: int, rows: torch.Tensor) -> None:
        """Rows from `start` on into `rows` (CPU, contiguous), converted to its dtype."""
        row_bytes = info.nbytes // max(info.shape[0], 1)
        if rows.dtype == info.dtype:
            self._fill(info, start * row_bytes, rows)
            return
        for first, block in self.blocks(info, start, start + rows.shape[0]):
            rows.narrow(0, first - start, block.shape[0]).copy_(block)

    def blocks(
        self, info: StoredTensor, start: int, stop: int
    ) -> Iterable[tuple[int, torch.Tensor]]:
        """Rows `start:stop` (along axis 0) in blocks of at most 32 MiB: (first row, rows)."""
        row_shape = info.shape[1:]
        row_bytes = info.nbytes // max(info.shape[0], 1)
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        for first in range(start, stop, step):
            rows = torch.empty((min(step, stop - first), *row_shape), dtype=info.dtype)
            self._fill(info, first * row_bytes, rows)
            yield first, rows

    def _fill(self, info: StoredTensor, begin: int, rows: torch.Tensor) -> None:
        if not fill(self._fd(info.file), rows, info.offset + begin):
            raise ValueError(f"{info.file}: its end is gone; it shrank while being read")
