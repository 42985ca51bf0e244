"""Tokenised conversations on disk or in memory: written once, then memory-mapped by every rank.

Layout of a store's directory (little-endian):

    tokens.u32   token ids of all conversations, with the flags of spec in their highest bits
    offsets.i64  [N + 1] where each conversation begins in tokens
    rows.i64     [N] line (1-based) or row number (1-based) in the source file
    files.i32    [N] which of the source's files
    weights.f32  only where rows have weights: the factor on the loss of each token, 0 where it is
                 1 or the token does not train (so the file has holes where no row has weights)
    meta.json    counts, sizes and statistics; written last

The directory is renamed into place when it is whole, so a killed tokenisation leaves nothing that
looks like a store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_dft.data.cache import partial_path
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.verified import check_files, remember
from megatron_dft.storage.files import read_json_object, write_whole

_ARRAYS = {"tokens.u32": "<u4", "offsets.i64": "<i8", "rows.i64": "<i8", "files.i32": "<i4"}
_WEIGHTS = "weights.f32"


@dataclass
class Block:
    """Tokenised conversations on their way into a store, in the order of their rows."""

    tokens: np.ndarray  # uint32 [sum of lengths]
    lengths: np.ndarray  # int64 [N]
    rows: np.ndarray  # int64 [N]
    files: np.ndarray  # int32 [N]
    counts: dict[str, int] = field(default_factory=dict)
    weights: np.ndarray | None = None  # float32 [sum of lengths], as in weights.f32


class TokenStore:
    """Random access to tokenised conversations.

    tokens: uint32 [T]; offsets: int64 [N + 1]; rows: int64 [N]; files: int32 [N]; meta: what
    meta.json holds (`paths`, `counts`, `largest_id`, …); weights: float32 [T] as in weights.f32, or
    None. Every conversation ends with a supervised token.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        files: np.ndarray,
        meta: dict[str, Any],
        weights: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.offsets, self.rows, self.files, self.meta, self.weights = (
            tokens, offsets, rows, files, meta, weights
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
            {
                **meta,
                "counts": sum_counts(b.counts for b in listed),
                "largest_id": max((_largest_id(b) for b in listed), default=-1),
            },
            _joined_weights(listed),
        )

    @classmethod
    def open(cls, directory: Path) -> TokenStore:
        """Maps a finished store; raises ValueError where its files do not fit its meta.json."""
        meta = _read_meta(directory)
        arrays: list[np.ndarray] = []
        names = dict(_ARRAYS)
        if _WEIGHTS in meta["bytes"]:
            names[_WEIGHTS] = "<f4"
        for name, kind in names.items():
            path, expected = directory / name, meta["bytes"][name]
            actual = path.stat().st_size if path.exists() else -1
            if actual != expected:
                raise ValueError(
                    f"the data cache {str(directory)!r} is damaged: {name} has {actual} bytes, "
                    f"expected {expected}; delete the directory and start again"
                )
            empty = np.empty(0, dtype=kind)
            whole = np.memmap(path, dtype=kind, mode="r") if expected else empty
            arrays.append(np.asarray(whole))  # a slice of a memmap costs four times as much
        check_files(directory, meta["sha256"])
        tokens, offsets, rows, files, *weights = arrays
        return cls(tokens, offsets, rows, files, meta, *weights)

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

    def token_weights(self, index: int) -> np.ndarray:
        """float32 [n]: the factor on each token's loss, above 0 exactly where it trains."""
        supervised = self.supervised(index)
        if self.weights is None:
            return supervised.astype(np.float32)
        own = self.weights[self.offsets[index] : self.offsets[index + 1]]
        return np.where(supervised & (own == 0), np.float32(1), own)

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
        self._files: dict[str, BinaryIO] = {n: open(self._partial / n, "wb") for n in _ARRAYS}
        self._tokens, self._largest_id = 0, -1
        self._weights: BinaryIO | None = None
        self._counts: list[dict[str, int]] = []
        self._hashes = {n: hashlib.sha256() for n in _ARRAYS}
        self._write("offsets.i64", np.zeros(1, dtype="<i8").tobytes())

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def add(self, block: Block) -> None:
        if block.weights is not None:
            self._add_weights(block.weights)
        self._largest_id = max(self._largest_id, _largest_id(block))
        ends = self._tokens + np.cumsum(block.lengths)
        self._tokens += int(block.lengths.sum())
        arrays = (block.tokens, ends, block.rows, block.files)
        for (name, kind), array in zip(_ARRAYS.items(), arrays, strict=True):
            self._write(name, array.astype(kind, copy=False).tobytes())
        self._counts.append(block.counts)

    def _add_weights(self, weights: np.ndarray) -> None:
        if self._weights is None:
            self._weights = self._files[_WEIGHTS] = open(self._partial / _WEIGHTS, "wb")
        # Blocks without weights leave a hole, which reads as 0.
        self._weights.seek(4 * self._tokens)
        self._weights.write(weights.astype("<f4", copy=False).tobytes())

    def finish(self, meta: dict[str, Any]) -> TokenStore:
        if self._weights is not None:
            self._weights.truncate(4 * self._tokens)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if self._weights is not None:  # written with holes, so hashed as it lies there
            with open(self._partial / _WEIGHTS, "rb") as stored:
                self._hashes[_WEIGHTS] = hashlib.file_digest(stored, "sha256")
        meta = {
            **meta,
            "counts": sum_counts(self._counts),
            "largest_id": self._largest_id,
            "bytes": {n: (self._partial / n).stat().st_size for n in self._files},
            "sha256": {n: h.hexdigest() for n, h in self._hashes.items()},
        }
        write_whole(self._partial / "meta.json", json.dumps(meta))
        try:
            os.rename(self._partial, self._final)
        except OSError:
            # Another job on another machine finished the same store first: its bytes are ours.
            if not (self._final / "meta.json").exists():
                raise
            self.abandon()
        else:
            remember(self._final, meta["sha256"])
        return TokenStore.open(self._final)

    def abandon(self) -> None:
        """Leaves nothing behind."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, which has been said
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def _read_meta(directory: Path) -> dict[str, Any]:
    """meta.json; ValueError where it is not what `finish` wrote."""
    try:
        meta = read_json_object(directory / "meta.json")
        sizes, counts, hashes = meta.get("bytes"), meta.get("counts"), meta.get("sha256")
        if not isinstance(sizes, dict) or not isinstance(hashes, dict):
            raise ValueError("it lacks sizes or hashes")
        kinds = _ARRAYS | ({_WEIGHTS: "<f4"} if _WEIGHTS in sizes else {})
        for name, kind in kinds.items():
            size = sizes.get(name)
            if type(size) is not int or size < 0 or size % int(kind[-1]) or name not in hashes:
                raise ValueError(f"it has no size or hash of {name}")
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise ValueError("it counts something that is no number")
        if not isinstance(meta.get("paths", []), list) or type(meta.get("largest_id")) is not int:
            raise ValueError("it lacks paths or the largest id")
    except ValueError as error:
        raise ValueError(
            f"the data cache {str(directory)!r} is damaged: meta.json is not readable ({error}); "
            "delete the directory and start again"
        ) from None
    return meta


def _largest_id(block: Block) -> int:
    return int((block.tokens & ID_MASK).max(initial=0)) if len(block.tokens) else -1


def _joined_weights(blocks: list[Block]) -> np.ndarray | None:
    if all(b.weights is None for b in blocks):
        return None
    return np.concatenate(
        [np.zeros(len(b.tokens), np.float32) if b.weights is None else b.weights for b in blocks]
    )


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return total


def _concatenate(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)
