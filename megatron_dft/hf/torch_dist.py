"""Read and write Megatron's torch_dist checkpoints chunk by chunk, in one process.

torch_dist is PyTorch's distributed checkpoint format: files of tensors saved one after the other
and a `.metadata` that says which box of which global tensor lies where. PyTorch's own reader and
writer go through whole state dicts (the writer keeps every tensor of a file until the file is
closed).
"""

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dft.storage.files import write_whole
from megatron_dft.storage.overlap import WriteBehind
from megatron_dft.storage.pread import fill
from megatron_dft.storage.shard import locate
from megatron_dft.storage.torch_dist import TABLE, read_table, tiles

MAX_FILE_BYTES = 5 * 10**9
BOX_BYTES = 8 * 2**20  # no larger: malloc reuses such memory, larger boxes fault it in anew


class TorchDistWriter:
    """Writes one checkpoint directory; `close` makes it complete and flushes it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stream: Any = None
        self._name = ""
        self._files = 0
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}

    def _file(self) -> Any:
        if self._stream is not None and self._stream.tell() > MAX_FILE_BYTES:
            self._end_file()
        if self._stream is None:
            self._name = f"__0_{self._files}.distcp"
            self._files += 1
            self._stream = open(self._directory / self._name, "wb", buffering=2**20)
            self._behind = WriteBehind(self._stream.fileno())
        return self._stream

    def _end_file(self) -> None:
        self._stream.flush()
        self._behind.close()
        self._stream.close()
        self._stream = None

    def _store(self, index: MetadataIndex, save: Any) -> None:
        stream = self._file()
        begin = stream.tell()
        # The archive's checksums are as slow as the disk, and torch.load does not look at them.
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            save(stream)
        finally:
            torch.serialization.set_crc32_options(checksums)
        length = stream.tell() - begin
        self._behind.wrote(length)
        self._storage[index] = _StorageInfo(self._name, begin, length)

    def write_tensor(
        self, key: str, global_shape: tuple[int, ...], offset: tuple[int, ...], box: torch.Tensor
    ) -> None:
        """Write `box` (CPU, as many axes as the global tensor) at `offset` of the tensor `key`."""
        if key not in self._entries:
            properties = TensorProperties(dtype=box.dtype)
            self._entries[key] = TensorStorageMetadata(properties, torch.Size(global_shape), [])
        chunks = self._entries[key].chunks
        index = MetadataIndex(key, torch.Size(offset), len(chunks))
        chunks.append(ChunkStorageMetadata(torch.Size(offset), box.shape))
        self._store(index, lambda stream: torch.save(box, stream))

    def write_object(self, key: str, value: Any) -> None:
        """Write a Python object as Megatron's ShardedObjects are kept: a pickled list of one."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        self._entries[key] = BytesStorageMetadata()
        self._store(MetadataIndex(key), lambda stream: stream.write(buffer.getbuffer()))

    def close(self) -> None:
        self._end_file()
        metadata = Metadata(
            self._entries, storage_data=self._storage, storage_meta=StorageMeta(self._directory)
        )
        write_whole(self._directory / TABLE, pickle.dumps(metadata))
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))


@dataclass(frozen=True)
class Chunk:
    """Part of a stored box: global `offset`, and the tensor itself."""

    offset: tuple[int, ...]
    tensor: torch.Tensor


class TorchDistReader:
    """Reads stored boxes of tensors in parts of at most 8 MiB (or one row where that is more)."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError (one line) where the table of `directory` is not one."""
        self._directory = directory
        table = read_table(directory)
        self._entries = table.state_dict_metadata
        # Grouped once: a large model has tens of thousands of boxes under hundreds of keys.
        self._places: dict[str, list[tuple[str, int, int, tuple[int, ...]]]] = {}
        for index, info in table.storage_data.items():
            place = (info.relative_path, info.offset, info.length, tuple(index.offset or ()))
            self._places.setdefault(index.fqn, []).append(place)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape of the tensor `key`, or None where the checkpoint has no such tensor."""
        entry = self._entries.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def keys(self) -> set[str]:
        return set(self._entries)

    def chunks(self, key: str) -> Iterator[Chunk]:
        """The stored boxes of tensor `key`, in the order of the files, part by part.

        Raises ValueError where a file is damaged, or the boxes do not make the whole tensor.
        """
        entry = self._entries[key]
        dtype = entry.properties.dtype
        sizes = {tuple(c.offsets): tuple(c.sizes) for c in entry.chunks}
        places = sorted(self._places.get(key, []))
        whole = tiles(tuple(entry.size), [(offset, size) for offset, size in sizes.items()])
        if not whole or [p[3] for p in sorted(places, key=lambda p: p[3])] != sorted(sizes):
            raise ValueError(
                f"{self._directory}: the shards of {key!r} do not make the whole tensor (lost, or "
                "overlapping); copy the checkpoint again"
            )
        for path, begin, length, offset in places:
            file, shape = self._directory / path, sizes[offset]
            position = locate(file, begin, length, shape, dtype)
            axis = next((i for i, n in enumerate(shape) if n > 1), 0)  # what comes before is one
            row_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
            step = max(1, BOX_BYTES // row_bytes)
            with open(file, "rb", buffering=0) as f:
                for row in range(0, shape[axis], step):
                    part = list(shape)
                    part[axis] = min(step, shape[axis] - row)
                    tensor = torch.empty(part, dtype=dtype)
                    if not fill(f.fileno(), tensor, position + row * row_bytes):
                        raise ValueError(f"{file}: ends inside the tensor {key!r}; copy it again")
                    place = list(offset)
                    place[axis] += row
                    yield Chunk(tuple(place), tensor)
