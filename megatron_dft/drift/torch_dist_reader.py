"""Megatron's torch_dist checkpoints, read without Megatron, a process group or open unpickling.

A torch_dist directory (torch.distributed.checkpoint) has a pickled `.metadata`, which says where
each shard of each tensor lies, and `*.distcp` files of concatenated torch.save blobs. The pickle is
read by an unpickler that builds the classes of that table and an inert stand-in for any other, the
blobs by `shard.locate`, which builds none: a hostile file cannot run code.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dft.drift.checkpoint import TensorInfo
from megatron_dft.storage.pread import fill
from megatron_dft.storage.shard import locate

Chunk = tuple[tuple[int, ...], tuple[int, ...], Any]  # offsets, sizes, place in a file

# Not part of the model: optimizer, scheduler and bookkeeping entries of a training checkpoint.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class _Inert:
    """Takes the place of every class that the table of shards does not need (save plans, say)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        return (
            super().find_class(module, name) if (module, name) in _ALLOWED or is_dtype else _Inert
        )


def iteration_directory(path: Path) -> Path | None:
    """`path` or the iteration its tracker file names, where that is torch_dist; None otherwise."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    name = text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else None
    if name is None:
        raise ValueError(f"{tracker} holds {text[:40]!r}, expected an iteration number")
    if not (path / name / ".metadata").is_file():
        raise ValueError(
            f"{path / name} is no torch_dist checkpoint; drift reads Hugging Face directories and "
            "--ckpt-format torch_dist"
        )
    return path / name


class TorchDistCheckpoint:
    """The model's tensors (global shapes) of one torch_dist directory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with (path / ".metadata").open("rb") as handle:
                metadata = _MetadataUnpickler(handle).load()
            if not isinstance(metadata, Metadata):
                raise ValueError(f"it holds no {Metadata.__name__}")
            entries, storage = metadata.state_dict_metadata, metadata.storage_data
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{path / '.metadata'} is not torch_dist metadata: {reason}") from None
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        places = {(i.fqn, tuple(i.offset or ())): info for i, info in storage.items()}
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata) or name.startswith(_NOT_WEIGHTS):
                continue
            info = TensorInfo(tuple(entry.size), entry.properties.dtype)
            chunks = []
            for chunk in entry.chunks:
                place = places.get((name, tuple(chunk.offsets)))
                if place is None:
                    raise ValueError(
                        f"{path}: the shard of {name} at {tuple(chunk.offsets)} is lost"
                    )
                self._check(name, place)
                chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), place))
            covered = sum(TensorInfo(sizes, info.dtype).numel for _, sizes, _ in chunks)
            if covered != info.numel:
                raise ValueError(
                    f"{path}: the shards of {name} hold {covered} of {info.numel} items"
                )
            self.tensors[name] = info
            self._chunks[name] = chunks

    def _check(self, name: str, place: Any) -> None:
        file = self.path / place.relative_path
        if Path(place.relative_path).name != str(place.relative_path) or not file.is_file():
            raise ValueError(f"{self.path}: {name} lies in {place.relative_path}, which is missing")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{file} is compressed, which drift does not read; save it plainly")
        if place.offset + place.length > file.stat().st_size:
            raise ValueError(
                f"{file} is truncated: {name} ends behind its last byte; copy it again"
            )

    def open(self, name: str) -> "_Reader":
        info = self.tensors[name]
        return _Reader(self.path, info, self._chunks[name])


class _Reader:
    """Reads runs of elements that are neighbours both in the tensor and in a shard's file."""

    def __init__(self, path: Path, info: TensorInfo, chunks: list[Chunk]):
        self._itemsize = info.dtype.itemsize
        self._files: list[io.FileIO] = []
        starts, lengths, files, positions = [], [], [], []
        for offsets, sizes, place in chunks:
            file = path / place.relative_path
            position = locate(file, place.offset, place.length, sizes, info.dtype)
            first, length = _runs(info.shape, offsets, sizes)
            starts.append(first)
            lengths.append(np.full(len(first), length))
            files.append(np.full(len(first), len(self._files)))
            positions.append(position + np.arange(len(first)) * length * self._itemsize)
            self._files.append(file.open("rb", buffering=0))
        order = np.argsort(np.concatenate(starts), kind="stable")
        self._starts, self._lengths, self._file, self._positions = (
            np.concatenate(part)[order] for part in (starts, lengths, files, positions)
        )

    def read(self, start: int, out: torch.Tensor) -> None:
        view, stop = memoryview(out.view(torch.uint8).numpy()), start + out.numel()
        run = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            skip = start - int(self._starts[run])
            count = min(int(self._lengths[run]) - skip, stop - start)
            file = self._files[self._file[run]]
            part = view[: count * self._itemsize]
            if count <= 0 or not fill(
                file.fileno(), part, int(self._positions[run]) + skip * self._itemsize
            ):
                raise ValueError(f"{file.name}: no data for element {start} (overlapping or cut)")
            view, start, run = view[len(part) :], start + count, run + 1


def _runs(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Flat starts (rising) and common length of the contiguous runs of a window of `shape`."""
    axis = len(shape) - 1  # the last axis that the window does not cover whole
    while axis > 0 and sizes[axis] == shape[axis]:
        axis -= 1
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = np.array([sum(o * s for o, s in zip(offsets, strides, strict=True))])
    for size, stride in zip(sizes[:axis], strides, strict=False):
        starts = (starts[:, None] + np.arange(size) * stride).ravel()
    return starts, math.prod(sizes[axis:])
