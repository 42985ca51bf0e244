"""Which conversation comes when: a pure function of (seed, epoch), the same on every rank.

Nothing here depends on the layout, on the number of samples asked for or on what was read before,
so a run resumed at any step, on any number of ranks, meets the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on the key alone.

    Built from the bit generator's raw output, which numpy keeps stable between versions;
    Generator.permutation is not promised to be, and a resume may well cross an upgrade.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(raw, kind="stable")


class EpochOrder:
    """The conversations of each epoch, in training order.

    Args:
        sizes: conversations in each source.
        weights: how much of an epoch each source gives, or None for "every conversation once". With
            weights an epoch holds as many conversations as all sources together; a source that
            gives more than it has starts over, reshuffled, and one that gives less goes on in the
            next epoch where it stopped.
        seed: any integer ≥ 0.
        caps: at most so many conversations of each source an epoch; None for no cap. What a cap
            takes from a source is not given to the others: the epoch is shorter.
        epochs: without weights, how often an epoch takes each conversation of a source (2: twice,
            0.5: half of them, the other half in the next epoch); None for once.
        shuffled: False for every epoch in the order of the sources and their rows.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        caps: Sequence[int | None] | None = None,
        epochs: Sequence[float | None] | None = None,
        shuffled: bool = True,
    ) -> None:
        self._sizes = list(sizes)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self._seed, self.shuffled = seed, shuffled
        counts = _shares(self._sizes, weights)
        if epochs is not None:
            counts = [c if e is None else round(c * e) for c, e in zip(counts, epochs, strict=True)]
        if caps is not None:
            counts = [c if m is None else min(c, m) for c, m in zip(counts, caps, strict=True)]
        self._counts = counts

    def counts(self) -> list[int]:
        """Conversations that each source gives to an epoch."""
        return list(self._counts)

    def epoch_size(self) -> int:
        """Conversations in an epoch."""
        return int(sum(self._counts))

    def epoch(self, epoch: int) -> np.ndarray:
        """int64, one epoch: indices into the concatenated sources, shuffled unless told not to."""
        if not self.shuffled:
            return self.in_file_order()
        drawn = np.concatenate([self._draw(s, epoch) for s in range(len(self._sizes))])
        return drawn[permutation(len(drawn), self._seed, 0, epoch)]

    def in_file_order(self) -> np.ndarray:
        """int64 [sum of sizes]: every conversation once, as the files give them."""
        return np.arange(self._starts[-1], dtype=np.int64)

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        size, count = self._sizes[source], self._counts[source]
        if count == 0:
            return np.empty(0, dtype=np.int64)
        position, pieces = epoch * count, []
        end = position + count
        while position < end:
            lap, offset = divmod(position, size)
            take = min(size - offset, end - position)
            order = permutation(size, self._seed, 1, source, lap)
            pieces.append(order[offset : offset + take])
            position += take
        return np.concatenate(pieces) + self._starts[source]


def _shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Conversations that each source gives to an epoch, by largest remainder."""
    if weights is None:
        return list(sizes)
    total, scale = sum(sizes), sum(weights)
    exact = [total * w / scale for w in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts
