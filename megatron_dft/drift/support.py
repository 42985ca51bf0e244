"""Which weights an update changed, and which of those were near zero in the base.

Changed: not equal in the *load dtype*, the one in which the two models would be used (exact zeros
of Δ, arXiv 2505.11711). Near zero: |w₀| below the `QUANTILE`-quantile of its own tensor, or w₀ = 0;
with ties at the quantile fewer than that share are near zero, so the share itself is reported too.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from megatron_dft.drift.histogram import BUCKETS, SHIFT

QUANTILE = 0.1
_COARSE_FIRST = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LOW = 1 << SHIFT


def load_dtype(
    base: torch.dtype, tuned: torch.dtype, asked: torch.dtype | None = None
) -> torch.dtype:
    """The coarsest of the stored dtypes and of the one asked for."""
    kinds = {base, tuned} | ({asked} if asked is not None else set())
    return next(kind for kind in _COARSE_FIRST if kind in kinds)


def changed(
    base: torch.Tensor,
    tuned: torch.Tensor,
    delta: torch.Tensor,
    rounding: torch.dtype | None,
    out: np.ndarray,
) -> np.ndarray:
    """bool [n] in `out`: the entries that differ once both sides are rounded to `rounding`.

    base, tuned, delta: [n], not changed. `rounding` is None where both were stored in the load
    dtype: then they differ where Δ ≠ 0.
    """
    n = delta.numel()
    if rounding is None:
        return np.not_equal(delta.numpy(), 0, out=out[:n])
    torch.ne(base.to(rounding), tuned.to(rounding), out=torch.from_numpy(out[:n]))
    return out[:n]


def is_near_zero(base: torch.Tensor, threshold: float, out: np.ndarray) -> np.ndarray:
    """bool [n] in `out`: |w₀| < threshold, or w₀ = 0. `base`: float32 [n]."""
    n = base.numel()
    magnitude = torch.abs(base).numpy()
    if threshold == 0:
        return np.equal(magnitude, 0, out=out[:n])
    return np.less(magnitude, np.float32(threshold), out=out[:n])


def quantile(
    blocks: Callable[[], Iterable[torch.Tensor]], count: int, is_coarse: bool, share: float
) -> float:
    """The (⌊share · count⌋ + 1)-th smallest magnitude of `count` float32 entries, exactly.

    A radix selection: one pass of `blocks()` counts the upper bits of each float32 pattern, a
    second the lower bits within the bucket found; `is_coarse`: all lower bits are 0 (bfloat16).
    """
    if not count:
        return 0.0
    rank = min(int(share * count), count - 1)
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for block in blocks():
        found = torch.bincount(torch.abs(block).view(torch.int32) >> SHIFT).numpy()
        counts[: len(found)] += found
    reached = np.cumsum(counts)
    bucket = int(np.searchsorted(reached, rank, side="right"))
    low = 0
    if not is_coarse:
        inside = np.zeros(_LOW, dtype=np.int64)
        for block in blocks():
            bits = torch.abs(block).view(torch.int32)
            here = bits[(bits >> SHIFT) == bucket] & (_LOW - 1)
            inside += np.bincount(here.numpy(), minlength=_LOW)
        before = int(reached[bucket] - counts[bucket])
        low = int(np.searchsorted(np.cumsum(inside), rank - before, side="right"))
    return float(np.array([(bucket << SHIFT) | low], dtype=np.uint32).view(np.float32)[0])


def intersections(masks: list[np.ndarray]) -> np.ndarray:
    """int64 [M, M]: in how many entries both of two masks are true."""
    result = np.zeros((len(masks), len(masks)), dtype=np.int64)
    for i, left in enumerate(masks):
        result[i, i] = np.count_nonzero(left)
        for j in range(i):
            result[i, j] = result[j, i] = np.count_nonzero(left & masks[j])
    return result


def jaccard(both: np.ndarray) -> list[list[float | None]]:
    """|S_i ∩ S_j| / |S_i ∪ S_j| of `intersections`; None where neither changed a weight."""
    return _of_pairs(both, lambda i, j: both[i, j])


def jaccard_by_chance(both: np.ndarray, count: int) -> list[list[float | None]]:
    """What `jaccard` would be for independent supports of the same sizes among `count` weights."""
    n = max(count, 1)
    return _of_pairs(both, lambda i, j: both[i, i] * (both[j, j] / n))


def _of_pairs(both: np.ndarray, common: Callable[[int, int], float]) -> list[list[float | None]]:
    size = range(len(both))

    def one(i: int, j: int) -> float | None:
        shared = common(i, j)
        union = both[i, i] + both[j, j] - shared
        return float(shared / union) if union else None

    return [[one(i, j) for j in size] for i in size]
