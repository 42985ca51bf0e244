"""How the size of an update is spread over its entries: a histogram that adds up over tensors.

Sorting every entry of a model is out of reach, and sorted tensors cannot be merged into layers. So
magnitudes |Δ| are counted by the top bits of their float32 pattern (8 exponent and 8 mantissa
bits): 65536 buckets whose values differ by at most 2^-8 of their size. A bucket's midpoint is thus
within `RELATIVE_ERROR` = 2^-9 of every entry in it, and both statistics below are off by no more
than that (plus its square): shifting sorted entries x_i by factors 1 + δ_i, |δ_i| ≤ ε, moves
Σ c_i x_i / Σ x_i by at most ε times the mean absolute deviation of the c_i, which is ≤ 1 for c in
[-1, 1] (Gini) and, with 2ε for squares, ≤ 1/2 for c in {0, 1} (top share).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SHIFT = 15  # bits of a float32 pattern below a bucket's
BUCKETS = 1 << (31 - SHIFT)
RELATIVE_ERROR = 2.0**-9
TOP_PARTS = 100  # the top share is that of the largest n / TOP_PARTS entries


def _midpoints() -> np.ndarray:
    """float64 [BUCKETS]; bucket 0 (below 2^-133) counts as zero."""
    bits = (np.arange(BUCKETS, dtype=np.uint32) << SHIFT).astype(np.uint32)
    lower = bits.view(np.float32).astype(np.float64)
    upper = (bits + np.uint32((1 << SHIFT) - 1)).view(np.float32).astype(np.float64)
    middle = (lower + upper) / 2
    middle[0] = 0.0
    return middle


with np.errstate(invalid="ignore"):  # the last buckets are inf and NaN patterns, never counted
    MIDPOINTS = np.nan_to_num(_midpoints(), posinf=0.0, neginf=0.0)


class Histogram:
    """Counts of the buckets: all of them while entries are added, the used ones once pickled."""

    def __init__(self) -> None:
        self._counts: np.ndarray | None = None
        self._used: tuple[np.ndarray, np.ndarray] | None = None  # buckets (rising) and their counts

    def __getstate__(self) -> dict[str, Any]:
        return {"_counts": None, "_used": self._sparse()}

    def _dense(self) -> np.ndarray:
        if self._counts is None:
            self._counts = np.zeros(BUCKETS, dtype=np.int64)
            if self._used is not None:
                self._counts[self._used[0]] = self._used[1]
        self._used = None
        return self._counts

    def _sparse(self) -> tuple[np.ndarray, np.ndarray]:
        if self._used is None:
            buckets = np.flatnonzero(self._dense() != 0)
            self._used = buckets, self._dense()[buckets]
        return self._used

    def add(self, magnitudes: torch.Tensor, scratch: torch.Tensor) -> None:
        """Count float32 magnitudes [n] (finite, +0 or more). `scratch`: int32 [n], overwritten."""
        torch.bitwise_right_shift(magnitudes.view(torch.int32), SHIFT, out=scratch)
        counts = torch.bincount(scratch).numpy()
        self._dense()[: len(counts)] += counts

    def merge(self, other: "Histogram") -> None:
        buckets, counts = other._sparse()
        self._dense()[buckets] += counts

    def occupied(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries n_B (int64) and value x_B (float64) of the non-empty buckets, values rising."""
        buckets, counts = self._sparse()
        return counts, MIDPOINTS[buckets]


def top_share(n_B: np.ndarray, x_B: np.ndarray, parts: int = TOP_PARTS) -> float | None:
    """Part of ΣΔ² in the largest ceil(n / parts) entries; None where Δ = 0."""
    n_B, square_B = n_B[::-1], x_B[::-1] ** 2
    energy_B = n_B * square_B
    energy = energy_B.sum()
    if not energy:
        return None
    top = -(-int(n_B.sum()) // parts)
    edge = int(np.searchsorted(np.cumsum(n_B), top))
    held = energy_B[:edge].sum() + (top - n_B[:edge].sum()) * square_B[edge]
    return float(held / energy)


def gini(n_B: np.ndarray, x_B: np.ndarray) -> float | None:
    """Gini coefficient of |Δ|, 0 = all entries alike, 1 - 1/n = one entry has it all; None: Δ = 0.

    G = Σ_i (2i - n - 1) x_i / (n Σ x_i) over the entries in rising order, i = 1..n.
    """
    total, mass = float(n_B.sum()), float((n_B * x_B).sum())
    if not total or not mass:
        return None
    before = np.cumsum(n_B) - n_B
    # Ranks of a bucket's entries average to before + (n_B + 1) / 2.
    return float(((2.0 * before + n_B - total) * n_B * x_B).sum() / (total * mass))


def lorenz(n_B: np.ndarray, x_B: np.ndarray, shares: Sequence[float]) -> list[float] | None:
    """Part of ΣΔ² held by the top `shares` (each in (0, 1]) of the entries; None where Δ = 0."""
    n_B, x_B = n_B[::-1], x_B[::-1]
    energy = n_B * x_B**2
    if not energy.sum():
        return None
    entries = np.concatenate(([0.0], np.cumsum(n_B))) / n_B.sum()
    held = np.concatenate(([0.0], np.cumsum(energy))) / energy.sum()
    return [float(v) for v in np.interp(shares, entries, held)]
