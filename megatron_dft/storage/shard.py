"""Where a shard's elements lie in a `*.distcp` file, found without loading or unpickling it.

A shard is what `torch.save` wrote for one tensor: a zip archive of uncompressed records, of which
`data.pkl` describes the tensor and one under `data/` holds its bytes.
"""

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_dft.storage import pickle_scan

_LOCAL_HEADER = 30  # bytes before the name in a zip record; its last four are two lengths


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file as a file."""

    def __init__(self, file: io.FileIO, offset: int, length: int):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        self._file.seek(self._offset + self._position)
        got = self._file.readinto(view) or 0
        self._position += got
        return got


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> tuple[Any, ...]:
    return storage, offset, tuple(size), tuple(stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Description(pickle.Unpickler):
    """Reads `data.pkl` into (storage, offset, size, stride); no class of the file is made."""

    _known = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("collections", "OrderedDict"): dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or name.endswith("Storage")):
            return tuple if name == "Size" else name
        if (module, name) not in self._known:
            raise ValueError(f"it names {module}.{name}")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def locate(file: Path, offset: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The position in `file` of the first element of the shard in bytes [offset, offset + length).

    `shape` and `dtype` are what the checkpoint's table says of it. Raises ValueError where the
    bytes there are no such tensor, stored row by row.
    """
    try:
        with file.open("rb", buffering=0) as handle, _Window(handle, offset, length) as window:
            with zipfile.ZipFile(window) as archive:
                names = {"/".join(i.filename.split("/")[1:]): i for i in archive.infolist()}
            # Not archive.read(): torch can leave out the checksums that it would want.
            window.seek(_start(names["data.pkl"], window))
            described = window.read(names["data.pkl"].file_size)
            pickle_scan.check(described)
            (kind, storage, key, *_), first, size, stride = _Description(
                io.BytesIO(described)
            ).load()
            record = names[f"data/{key}"]
            start, stored = _start(record, window), getattr(torch, storage).dtype
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file}: the shard at byte {offset} is damaged: {reason}") from None
    wanted = math.prod(shape) * dtype.itemsize
    found = (kind, stored, first, size, record.file_size)
    plain = record.compress_type == zipfile.ZIP_STORED and stride == _row_major(size, stride)
    if found != ("storage", dtype, 0, shape, wanted) or not plain:
        raise ValueError(
            f"{file}: the shard at byte {offset} is not the {dtype} tensor {list(shape)} that the "
            "checkpoint's table says, stored row by row; save the checkpoint again"
        )
    return offset + start


def _start(record: zipfile.ZipInfo, window: _Window) -> int:
    """The position of a record's first byte."""
    window.seek(record.header_offset + _LOCAL_HEADER - 4)
    name, extra = struct.unpack("<HH", window.read(4))
    return record.header_offset + _LOCAL_HEADER + name + extra


def _row_major(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a row-major tensor; as given where an axis of one element allows any."""
    wanted = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    return tuple(g if n == 1 else w for n, g, w in zip(size, stride, wanted, strict=True))
