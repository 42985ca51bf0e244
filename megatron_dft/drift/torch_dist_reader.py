"""Megatron's torch_dist checkpoints, read without Megatron, a process group or open unpickling.

A torch_dist directory (torch.distributed.checkpoint) has a pickled `.metadata`, which says where
each shard of each tensor lies, and `*.distcp` files of concatenated torch.save blobs. The pickle is
read by an unpickler that builds the classes of that table and an inert stand-in for any other, the
blobs with `weights_only=True`: a hostile file cannot run code.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dft.drift.checkpoint import TensorInfo

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
        self._chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], Any]]] = {}
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

    def _load(self, place: Any) -> torch.Tensor:
        file = self.path / place.relative_path
        with file.open("rb") as handle:
            handle.seek(place.offset)
            blob = io.BytesIO(handle.read(place.length))
        try:
            return torch.load(blob, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{file}: the shard at byte {place.offset} is damaged: {reason}"
            ) from None

    def open(self, name: str) -> "_Reader":
        """Assemble the tensor from its shards: it stays in memory while the reader lives."""
        info, chunks = self.tensors[name], self._chunks[name]
        if len(chunks) == 1:
            return _Reader(self._load(chunks[0][2]).contiguous().flatten())
        whole = torch.empty(info.shape, dtype=info.dtype)
        for offsets, sizes, place in chunks:
            window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[window].copy_(self._load(place).reshape(sizes))
        return _Reader(whole.flatten())

    def resident_bytes(self, name: str) -> int:
        return self.tensors[name].nbytes


class _Reader:
    def __init__(self, flat: torch.Tensor):
        self._flat = flat

    def read(self, start: int, out: torch.Tensor) -> None:
        out.copy_(self._flat[start : start + out.numel()])
