"""Validation rows that train too are counted by their tokens, wherever they stand."""

import numpy as np
import pytest

from megatron_dft.data import shared_rows
from megatron_dft.data.spec import SUPERVISED
from megatron_dft.data.store import Block, TokenStore


def _store(*conversations):
    lengths = np.array([len(c) for c in conversations], np.int64)
    tokens = np.array([t for c in conversations for t in c], np.uint32)
    place = np.arange(len(conversations))
    block = Block(tokens, lengths, place, np.zeros(len(conversations), np.int32), {})
    return TokenStore.from_blocks([block], {})


@pytest.mark.parametrize("size", [1, 2, 65536])
def test_conversations_of_both_are_counted(monkeypatch, size):
    monkeypatch.setattr(shared_rows, "_SLICE", size)
    long = list(range(100, 200))
    # Where the first probes look it is the same.
    other = [*long[:50], 7, *long[51:]]
    trained = [1, 2, 3 | int(SUPERVISED)]
    first = _store([5, 6], trained, [9], [4, 4, 4])
    second = _store(long, [8])
    valid = [_store([1, 2, 3], [1, 2, 4], [9], other), _store(long, [1, 2, 3], [3, 2, 1], [1, 2])]
    # [1, 2, 3] with another mask, twice; [9]; the long one.
    assert shared_rows.shared([first, second], valid) == 4
    assert shared_rows.shared([second], valid[:1]) == 0
