"""Conversations that are copies of others of the same item, by their tokens."""

from __future__ import annotations

import numpy as np

from megatron_dft.data.held_out import conversation_hashes


class Duplicates:
    """Counts copies over the blocks of an item, eight bytes a conversation."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """tokens: flagged, uint32 [sum of lengths]; lengths: int64 [N]."""
        if len(lengths):
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            self._hashes.append(conversation_hashes(tokens, offsets))

    def count(self) -> int:
        """How many conversations have been met before."""
        if not self._hashes:
            return 0
        every = np.concatenate(self._hashes)
        return len(every) - len(np.unique(every))
