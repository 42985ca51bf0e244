"""Megatron's torch_dist checkpoints, read without Megatron, a process group or open unpickling.

The table that says where each shard lies is read by storage/torch_dist.py, the shards themselves
(concatenated torch.save blobs) by storage/shard.py: a hostile file cannot run code.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dft.storage.pread import fill
from megatron_dft.storage.shard import locate
from megatron_dft.storage.tensor_info import TensorInfo
from megatron_dft.storage.torch_dist import (
    TABLE,
    iteration_directory,
    read_table,
    read_tracker,
    tiles,
)

Chunk = tuple[tuple[int, ...], tuple[int, ...], Any]  # offsets, sizes, place in a file

# Not part of the model: optimizer, scheduler and bookkeeping entries of a training checkpoint.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")


def iteration_of(path: Path) -> Path | None:
    """`path` or the iteration its tracker file names, where that is torch_dist; None otherwise."""
    if (path / TABLE).is_file():
        return path
    iteration = read_tracker(path)
    if iteration is None:
        return None
    found = iteration_directory(path, iteration)
    if not (found / TABLE).is_file():
        raise ValueError(
            f"{found} is no torch_dist checkpoint; drift reads Hugging Face directories and "
            "--ckpt-format torch_dist"
        )
    return found


class TorchDistCheckpoint:
    """The model's tensors (global shapes) of one torch_dist directory."""

    def __init__(self, path: Path):
        self.path = path
        table = read_table(path)
        entries, storage = table.state_dict_metadata, table.storage_data
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
            if not tiles(info.shape, [(offsets, sizes) for offsets, sizes, _ in chunks]):
                covered = sum(math.prod(sizes) for _, sizes, _ in chunks)
                raise ValueError(
                    f"{path}: the shards of {name} hold {covered} of {info.numel} items, or "
                    "overlap; copy the checkpoint again"
                )
            self.tensors[name] = info
            self._chunks[name] = chunks

    def _check(self, name: str, place: Any) -> None:
        file = self.path / place.relative_path
        if not file.is_file():
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
