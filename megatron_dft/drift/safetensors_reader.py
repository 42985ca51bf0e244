"""Safetensors directories read by offset: no mapping of whole files, so memory stays bounded.

`safetensors.safe_open` maps the file, and every page it touched counts as resident memory. Reading
runs of elements with `preadv` into the caller's buffer keeps the footprint at that buffer. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_dft.drift.checkpoint import TensorInfo
from megatron_dft.storage.dtypes import DTYPES
from megatron_dft.storage.pread import fill

_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def _bad(file: Path, what: str) -> ValueError:
    return ValueError(f"{file}: {what}; the file is damaged or incomplete, copy it again")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset of the first data byte, both checked against the size."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise _bad(file, f"{size} bytes are no safetensors file (header of {length} bytes)")
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            raise _bad(file, "the safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(file, "the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entries(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Every tensor of one file: its info and the offset of its first byte in the file."""
    header, data = _header(file)
    size = file.stat().st_size
    entries = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            shape = tuple(int(s) for s in entry["shape"])
            kind = entry["dtype"]
        except (KeyError, TypeError, ValueError):
            raise _bad(file, f"the header entry of {name!r} is malformed") from None
        if kind not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {kind}, which is not supported")
        info = TensorInfo(shape, DTYPES[kind])
        if not 0 <= begin <= end or end - begin != info.nbytes:
            raise _bad(file, f"{name} has {end - begin} bytes, its shape needs {info.nbytes}")
        if data + end > size:
            raise _bad(file, f"{name} ends at byte {data + end}, the file has {size} (truncated)")
        entries[name] = (info, data + begin)
    return entries


def _files(path: Path) -> tuple[list[Path], set[str] | None]:
    """The shards of a model directory, and the tensors its index promises (None: no index)."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(s) for s in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} has no readable weight_map; copy it again") from None
        outside = [s for s in shards if Path(s).name != s]
        if outside:
            raise ValueError(f"{index} names {outside[0]!r}, which is no file of its directory")
        missing = [s for s in shards if not (path / s).is_file()]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}); "
                "finish the download or copy"
            )
        return [path / s for s in shards], set(weight_map)
    single = path / "model.safetensors"
    if single.is_file():
        return [single], None
    files = sorted(path.glob("*.safetensors"))
    if any(f.name.startswith("adapter_") for f in files):
        raise ValueError(f"{path} holds an adapter, not a model; merge it into its base first")
    if not files:
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ValueError(
                f"{path} holds pickled weights only ({pickled[0]}), which are never read: loading "
                "runs code; save it with save_pretrained(..., safe_serialization=True)"
            )
        raise ValueError(f"{path} holds no *.safetensors and is no torch_dist checkpoint")
    return files, None


class SafetensorsCheckpoint:
    """All tensors of a directory's safetensors shards. Raises ValueError on a damaged shard."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._place: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        files, promised = _files(path)
        for number, file in enumerate(files):
            for name, (info, offset) in _entries(file).items():
                if name in self.tensors:
                    raise ValueError(f"{path}: {name} is in two shards; remove the stale one")
                self.tensors[name] = info
                self._place[name] = (number, offset)
            self._descriptors.append(os.open(file, os.O_RDONLY))
        self._files = files
        absent = sorted((promised or set()) - set(self.tensors))
        if absent:
            raise ValueError(f"{path}: the index promises {absent[0]}, but no shard holds it")

    def open(self, name: str) -> "_Reader":
        number, offset = self._place[name]
        return _Reader(self._descriptors[number], offset, self._files[number])

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", ()):
            os.close(descriptor)


class _Reader:
    def __init__(self, descriptor: int, offset: int, file: Path):
        self._descriptor, self._offset, self._file = descriptor, offset, file

    def read(self, start: int, out: torch.Tensor) -> None:
        position = self._offset + start * out.element_size()
        if not fill(self._descriptor, out, position):
            raise _bad(self._file, f"no data behind byte {position} (truncated while read)")
