"""Conversations of the validation data that are trained on too: a loss of them says nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_dft.data.held_out import mix
from megatron_dft.data.spec import ID_MASK
from megatron_dft.data.store import TokenStore

# Tokens of a conversation that are looked at first, spread over it: at every start all of a large
# set would be read from the disk otherwise.
_PROBES = 8
_SLICE = 1 << 16


def shared(train: Sequence[TokenStore], valid: Sequence[TokenStore]) -> int:
    """How many conversations of `valid` stand in `train`, token by token."""
    wanted = np.unique(np.concatenate([np.concatenate([*_probed(store)]) for store in valid]))
    found: set[bytes] = set()
    for store in train:
        for number, probed in enumerate(_probed(store)):
            alike = np.flatnonzero(np.isin(probed, wanted))
            found.update(_ids(store, number * _SLICE + alike))
    return sum(ids in found for store in valid for ids in _ids(store, np.arange(len(store))))


def _probed(store: TokenStore) -> Iterator[np.ndarray]:
    """uint64 [_SLICE], the last one shorter: a hash of the length and of some tokens of each
    conversation."""
    every = np.asarray(store.tokens)
    for begin in range(0, len(store), _SLICE):
        offsets = store.offsets[begin : begin + _SLICE + 1]
        lengths = np.diff(offsets)
        found = lengths.astype(np.uint64)
        for probe in range(_PROBES):
            places = offsets[:-1] + probe * (lengths - 1) // (_PROBES - 1)
            found = mix(found ^ mix((every[places] & ID_MASK).astype(np.uint64)))
        yield found


def _ids(store: TokenStore, numbers: np.ndarray) -> Iterator[bytes]:
    for number in numbers.tolist():
        begin, end = store.offsets[number : number + 2]
        yield (np.asarray(store.tokens[begin:end]) & ID_MASK).tobytes()
