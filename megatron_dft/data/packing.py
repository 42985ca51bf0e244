"""Best-fit-decreasing packing of conversations into rows.

Source: Johnson, "Near-optimal bin packing algorithms" (1973): the longest item first, each into the
fullest bin that still takes it. It runs over windows of the shuffled order rather than over the
whole epoch: time and memory stay linear, and which conversations share a row changes every epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# A window fills about this many rows; at most one of them stays part empty for want of items.
WINDOW_ROWS = 1024


@dataclass(frozen=True)
class Packs:
    """Rows of conversations: row r holds members[starts[r] : starts[r + 1]].

    members: int64 [N], starts: int64 [R + 1]; either may be memory-mapped.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """int64: the members of row `index`."""
        return self.members[self.starts[index] : self.starts[index + 1]]

    def most_members(self) -> int:
        """The largest number of conversations in one row."""
        return int(np.diff(self.starts).max(initial=0))


def pack(
    order: np.ndarray,
    lengths: np.ndarray,
    capacity: int,
    row_order_key: tuple[int, ...] | None,
) -> Packs:
    """Packs conversations, in windows of their order.

    Args:
        order: int64 [N] which conversations, repeats allowed.
        lengths: int64: positions that conversation c takes, lengths[c], at most `capacity`.
        capacity: positions in a row.
        row_order_key: the rows are shuffled by this key (order.permutation); None leaves each
            window's rows in the order of the first conversation that each holds.
    """
    from megatron_dft.data.order import permutation

    rows: list[np.ndarray] = []
    for begin, end in windows(lengths[order], capacity * WINDOW_ROWS):
        window = order[begin:end]
        for positions in _best_fit_decreasing(lengths[window], capacity):
            rows.append(window[positions])
    if row_order_key is not None:
        rows = [rows[i] for i in permutation(len(rows), *row_order_key)]
    counts = np.array([0] + [len(r) for r in rows], dtype=np.int64)
    members = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return Packs(members.astype(np.int64, copy=False), np.cumsum(counts))


def windows(lengths: np.ndarray, tokens: int) -> list[tuple[int, int]]:
    """[begin, end) of consecutive windows of about `tokens` tokens each."""
    if not len(lengths):
        return []
    number = (np.cumsum(lengths) - lengths) // tokens
    borders = np.flatnonzero(np.diff(number)) + 1
    edges = [0, *borders.tolist(), len(lengths)]
    return list(zip(edges, edges[1:], strict=False))


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Positions into `lengths` for each bin; bins in the order of their earliest item."""
    # Free space and bin number in one integer: the smallest that fits is one bisection away.
    shift = 32
    open_bins: list[int] = []
    bins: list[list[int]] = []
    by_length = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    for item in by_length:
        size = sizes[item]
        found = bisect_left(open_bins, size << shift)
        if found == len(open_bins):
            free, number = capacity, len(bins)
            bins.append([])
        else:
            free, number = divmod(open_bins.pop(found), 1 << shift)
        bins[number].append(item)
        if free > size:
            insort(open_bins, (free - size) << shift | number)
    # In the order of the data, within a row and among rows.
    ordered = sorted(sorted(b) for b in bins)
    return [np.array(b, dtype=np.int64) for b in ordered]
