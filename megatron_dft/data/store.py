"""Tokenised conversations on disk or in memory: written once, then memory-mapped by every rank.

Layout of a store's directory (little-endian):

    tokens.u32   token ids of all conversations, bit 31 set on the supervised ones
    offsets.i64  [N + 1] where each conversation begins in tokens
    rows.i64     [N] line (1-based) or row number (1-based) in the source file
    files.i32    [N] which of the source's files
    meta.json    counts, sizes and statistics; written last

The directory is renamed into place when it is whole, so a killed tokenisation leaves nothing that
looks like a store.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dft.data.cache import partial_path
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.storage.files import read_json_object, write_whole

_ARRAYS = {"tokens.u32": "<u4", "offsets.i64": "<i8", "rows.i64": "<i8", "files.i32": "<i4"}
VERSION = 1


@dataclass
class Block:
    """Tokenised conversations on their way into a store, in the order of their rows."""

    tokens: np.ndarray  # uint32 [sum of lengths]
    lengths: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N]
    files: np.ndarray  # int32 [N]
    counts: dict[str, int] = field(default_factory=dict)


class TokenStore:
    """Random access to tokenised conversations.

    tokens: uint32 [T]; offsets: int64 [N + 1]; rows: int64 [N]; files: int32 [N]; meta: what
    meta.json holds (`paths`, `counts`, …). Every conversation ends with a supervised token.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        files: np.ndarray,
        meta: dict[str, Any],
    ) -> None:
        self.tokens, self.offsets, self.rows, self.files, self.meta = (
            tokens, offsets, rows, files, meta
        )  # fmt: skip

    @classmethod
    def from_blocks(cls, blocks: Iterable[Block], meta: dict[str, Any]) -> TokenStore:
        """A store in memory, for small data and tests."""
        listed = list(blocks)
        lengths = _concatenate([b.lengths for b in listed], np.int64)
        return cls(
            _concatenate([b.tokens for b in listed], np.uint32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            _concatenate([b.rows for b in listed], np.int64),
            _concatenate([b.files for b in listed], np.int32),
            {**meta, "counts": sum_counts(b.counts for b in listed)},
        )

    @classmethod
    def open(cls, directory: Path) -> TokenStore:
        """Maps a finished store; raises ValueError where its files do not fit its meta.json."""
        meta = _meta(directory)
        arrays: list[np.ndarray] = []
        for name, kind in _ARRAYS.items():
            path, expected = directory / name, meta["bytes"][name]
            actual = path.stat().st_size if path.exists() else -1
            if actual != expected:
                raise ValueError(
                    f"the data cache {str(directory)!r} is damaged: {name} has {actual} bytes, "
                    f"expected {expected}; delete the directory and start again"
                )
            empty = np.empty(0, dtype=kind)
            arrays.append(np.memmap(path, dtype=kind, mode="r") if expected else empty)
        tokens, offsets, rows, files = arrays
        return cls(tokens, offsets, rows, files, meta)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens in each conversation."""
        return np.diff(self.offsets)

    def flagged(self, index: int) -> np.ndarray:
        """uint32 [n]: one conversation, SUPERVISED flags in bit 31."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def ids(self, index: int) -> np.ndarray:
        """int64 [n]: one conversation's token ids."""
        return (self.flagged(index) & ID_MASK).astype(np.int64)

    def supervised(self, index: int) -> np.ndarray:
        """bool [n]: which of its tokens train."""
        return (self.flagged(index) & SUPERVISED) != 0

    def where(self, index: int) -> str:
        """file:line of the row that a conversation came from."""
        return f"{self.meta['paths'][self.files[index]]}:{self.rows[index]}"


class StoreWriter:
    """Writes blocks to a directory that becomes a store when `finish` is called."""

    def __init__(self, directory: Path) -> None:
        self._final = directory
        self._partial = partial_path(directory)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {n: open(self._partial / n, "wb") for n in _ARRAYS}
        self._tokens = 0
        self._counts: list[dict[str, int]] = []
        self._files["offsets.i64"].write(np.zeros(1, dtype="<i8").tobytes())

    def add(self, block: Block) -> None:
        ends = self._tokens + np.cumsum(block.lengths)
        self._tokens += int(block.lengths.sum())
        arrays = (block.tokens, ends, block.rows, block.files)
        for (name, kind), array in zip(_ARRAYS.items(), arrays, strict=True):
            self._files[name].write(array.astype(kind, copy=False).tobytes())
        self._counts.append(block.counts)

    def finish(self, meta: dict[str, Any]) -> TokenStore:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {
            **meta,
            "counts": sum_counts(self._counts),
            "bytes": {n: (self._partial / n).stat().st_size for n in _ARRAYS},
        }
        write_whole(self._partial / "meta.json", json.dumps(meta))
        try:
            os.rename(self._partial, self._final)
        except OSError:
            # Another job on another machine finished the same store first: its bytes are ours.
            if not (self._final / "meta.json").exists():
                raise
            self.abandon()
        return TokenStore.open(self._final)

    def abandon(self) -> None:
        """Leaves nothing behind."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _meta(directory: Path) -> dict[str, Any]:
    """meta.json; ValueError where it is not what `finish` wrote."""
    try:
        meta = read_json_object(directory / "meta.json")
        sizes, counts = meta.get("bytes"), meta.get("counts")
        whole = isinstance(sizes, dict) and all(
            type(sizes.get(name)) is int and sizes[name] >= 0 and sizes[name] % int(kind[-1]) == 0
            for name, kind in _ARRAYS.items()
        )
        paths = meta.get("paths", [])
        if not (whole and isinstance(counts, dict) and isinstance(paths, list)):
            raise ValueError("meta.json lacks sizes, counts or paths")
        if not all(type(n) is int for n in counts.values()):
            raise ValueError("meta.json counts something that is no number")
    except ValueError as error:
        raise ValueError(
            f"the data cache {str(directory)!r} is damaged: {error}; delete the directory and "
            "start again"
        ) from None
    return meta


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return total


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)
