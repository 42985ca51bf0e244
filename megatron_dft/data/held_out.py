"""A held-out part of the training data, for --valid-share: the same in every run and layout.

A row is held out by its own content, so neither the seed nor its place decides, and two copies of a
row, or the samples that one row became, never lie on both sides.
"""

from __future__ import annotations

import numpy as np

from megatron_dft.data.spec import ID_MASK
from megatron_dft.data.store import TokenStore

# Odd 64-bit constants; the mixing is splitmix64's (Steele, Lea, Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SLICE = 1 << 16


def held_out(store: TokenStore, share: float) -> np.ndarray:
    """bool [N]: the conversations of a store that are held out.

    share: of the rows, 0 < share < 1; exact up to one row and to copies. At least one row of a
    store of two or more stays on each side.
    """
    hashes = _row_hashes(store)
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        return np.zeros(len(store), dtype=bool)
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    return hashes < distinct[count]


def _row_hashes(store: TokenStore) -> np.ndarray:
    """uint64 [N]: a hash of the tokens of the row that each conversation is of."""
    own = _conversation_hashes(store)
    first = np.ones(len(store), dtype=bool)
    first[1:] = (np.diff(store.rows) != 0) | (np.diff(store.files) != 0)
    # The samples of one row begin alike and follow each other: the last holds all the others.
    row = np.cumsum(first) - 1
    ends = np.append(np.flatnonzero(first)[1:], len(store)) - 1
    return own[ends][row]


def _conversation_hashes(store: TokenStore) -> np.ndarray:
    hashes = np.empty(len(store), dtype=np.uint64)
    for begin in range(0, len(store), _SLICE):
        stop = min(begin + _SLICE, len(store))
        offsets = store.offsets[begin : stop + 1]
        ids = (store.tokens[offsets[0] : offsets[-1]] & ID_MASK).astype(np.uint64)
        starts = (offsets[:-1] - offsets[0]).astype(np.int64)
        place = np.arange(len(ids)) - np.repeat(starts, np.diff(offsets))
        mixed = mix(ids + _STEP * (place.astype(np.uint64) + np.uint64(1)))
        hashes[begin:stop] = mix(np.add.reduceat(mixed, starts))
    return hashes


def mix(value: np.ndarray) -> np.ndarray:
    """uint64 of any shape to as many hashes of them; one to one."""
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))
