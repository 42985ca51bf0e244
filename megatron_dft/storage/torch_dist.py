"""A torch_dist checkpoint's names and its table: which box of which tensor lies where.

torch_dist is PyTorch's distributed checkpoint format as Megatron writes it: a directory of
`*.distcp` files of tensors saved one after the other, a pickled `.metadata` that is the table, and
`metadata.json`. The pickle is read by storage/safe_pickle.py: no function that it names is called.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_dft.storage import safe_pickle
from megatron_dft.storage.files import read_json_object
from megatron_dft.storage.safe_pickle import UnsafeFileError

TRACKER = "latest_checkpointed_iteration.txt"  # these are Megatron's names
TABLE = ".metadata"
CONFIG = "metadata.json"
RELEASE = "release"  # what the tracker says of an imported checkpoint

_found_right = b""  # SHA-256 of the last table: a load reads it three times


def iteration_directory(root: Path, iteration: int | str) -> Path:
    """Where a checkpoint of `root` lies: of a step, or RELEASE."""
    return root / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")


def read_tracker(root: Path) -> str | None:
    """RELEASE or the digits of a step; None where `root` has no tracker.

    Raises ValueError where it holds anything else.
    """
    try:
        text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{root / TRACKER} cannot be read: {error.strerror}") from None
    if text != RELEASE and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError(
            f"{root / TRACKER} holds {text[:40]!r}, expected an iteration number or {RELEASE!r}"
        )
    return text


def backend(directory: Path) -> str | None:
    """The format that `metadata.json` names, such as "torch_dist"; None where there is none.

    Raises UnsafeFileError where it says no format.
    """
    if not (directory / CONFIG).is_file():
        return None
    try:
        name = read_json_object(directory / CONFIG).get("sharded_backend")
    except ValueError as error:
        raise UnsafeFileError(str(error)) from None
    if not isinstance(name, str):
        raise UnsafeFileError(f"{directory / CONFIG} names no sharded_backend; copy it again")
    return name


def read_table(directory: Path) -> Metadata:
    """The table of a checkpoint directory, checked: sizes are sizes, files are of this directory.

    Raises UnsafeFileError (one line naming the file) for anything else. What the table says of the
    data is not compared with it here.
    """
    global _found_right
    file = directory / TABLE
    try:
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest == _found_right:
            return safe_pickle.loads_checked(content)
        table, foreign = safe_pickle.loads(content)
        if not isinstance(table, Metadata):
            names = f" but names {foreign[0]}; nothing of it was run" if foreign else ""
            raise ValueError(f"it holds no {Metadata.__name__}{names}")
        if foreign:
            raise ValueError(f"it names {foreign[0]}; nothing of it was run")
        _check(table)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnsafeFileError(
            f"{file} is not torch_dist metadata: {reason}; copy the checkpoint again, from where "
            "you trust"
        ) from None
    _found_right = digest
    return table


def _check(table: Metadata) -> None:
    entries, storage = vars(table).get("state_dict_metadata"), vars(table).get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise ValueError("it has no tensors or no places")
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise ValueError("a tensor's name is no text")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"{name} is neither a tensor nor bytes")
    for index, place in storage.items():
        if not isinstance(index, MetadataIndex) or not isinstance(index.fqn, str):
            raise ValueError("a place belongs to no name")
        if not _is_place(place):
            raise ValueError(f"{index.fqn} lies in no file of the directory")


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    own = vars(entry)
    chunks, dtype = own.get("chunks"), getattr(own.get("properties"), "dtype", None)
    size = _sizes(own.get("size"))
    if not isinstance(dtype, torch.dtype) or size is None or not isinstance(chunks, list):
        raise ValueError(f"{name} has no dtype, shape or shards")
    for chunk in chunks:
        offsets = _sizes(getattr(chunk, "offsets", None))
        sizes = _sizes(getattr(chunk, "sizes", None))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(size):
            raise ValueError(f"a shard of {name} has no place in it")
        if any(o + n > s for o, n, s in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"the shard of {name} at {tuple(offsets)} leaves the tensor")


def _sizes(value: Any) -> torch.Size | None:
    """`value` where it is one axis after another, none negative."""
    return value if isinstance(value, torch.Size) and all(n >= 0 for n in value) else None


def _is_place(place: Any) -> bool:
    file, offset, length = (
        getattr(place, name, None) for name in ("relative_path", "offset", "length")
    )
    named = isinstance(file, str) and file == Path(file).name and "\0" not in file
    return named and all(type(n) is int and n >= 0 for n in (offset, length))


def tiles(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes (offsets, sizes) cover a tensor of `shape` without a hole or an overlap.

    Boxes of a grid, axis by axis, as sharding makes them; other tilings count as none.
    """
    if not shape:
        return len(boxes) == 1
    slabs: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for offsets, sizes in boxes:
        slabs.setdefault((offsets[0], sizes[0]), []).append((offsets[1:], sizes[1:]))
    end = 0
    for (offset, size), inner in sorted(slabs.items(), key=lambda slab: slab[0]):
        if offset != end or size == 0 or not tiles(shape[1:], inner):
            return False
        end += size
    return end == shape[0]
