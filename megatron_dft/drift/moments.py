"""Sums over the entries of an update Δ = tuned - base; they add up over blocks and tensors."""

from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_dft.drift.histogram import Histogram, gini, top_share

BLOCK = 1 << 18  # elements: less costs more in calls than it saves in cache misses
# |Δ| at or below it counts as unchanged; also times |w₀|. The code published with arXiv 2505.11711
# takes the first, absolute (torch.isclose against zeros, atol 1e-5).
SMALL = 1e-5
_RUN = 1 << 15  # elements of a float32 dot product: some BLAS lose 5e-6 over a whole block


@dataclass
class Moments:
    """Sums over entries; `merge` joins two sets of entries."""

    count: int = 0
    base_sq: float = 0.0
    delta_sq: float = 0.0
    delta_sum: float = 0.0
    delta_abs_sum: float = 0.0
    delta_max: float = 0.0
    unchanged_bf16: int = 0
    unchanged_small: int = 0
    unchanged_relative: int = 0
    changed: int = 0  # in the load dtype
    near_zero: int = 0
    changed_near_zero: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    def merge(self, other: "Moments") -> None:
        self.count += other.count
        self.base_sq += other.base_sq
        self.delta_sq += other.delta_sq
        self.delta_sum += other.delta_sum
        self.delta_abs_sum += other.delta_abs_sum
        self.delta_max = max(self.delta_max, other.delta_max)
        self.unchanged_bf16 += other.unchanged_bf16
        self.unchanged_small += other.unchanged_small
        self.unchanged_relative += other.unchanged_relative
        self.changed += other.changed
        self.near_zero += other.near_zero
        self.changed_near_zero += other.changed_near_zero
        self.histogram.merge(other.histogram)

    def statistics(self) -> dict[str, float | int | None]:
        """The numbers of a report's row. Norms in the weights' units; shares in [0, 1]."""
        n = max(self.count, 1)
        buckets = self.histogram.occupied()
        norm, base = self.delta_sq**0.5, self.base_sq**0.5
        return {
            "parameters": self.count,
            "base_norm": base,
            "update_norm": norm,
            "relative_norm": norm / base if base else None,
            "max_abs": self.delta_max,
            "mean": self.delta_sum / n,
            "mean_abs": self.delta_abs_sum / n,
            "unchanged": (self.count - self.changed) / n,
            "unchanged_bf16": self.unchanged_bf16 / n,
            "unchanged_1e-5": self.unchanged_small / n,
            "unchanged_rel_1e-5": self.unchanged_relative / n,
            "near_zero": self.near_zero / n,
            "changed_near_zero": self.changed_near_zero / self.changed if self.changed else None,
            "top1pct_share": top_share(*buckets),
            "gini": gini(*buckets),
        }


def dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """Σ x·y of two float32 blocks; in double where float32 would under- or overflow."""
    runs = zip(x.split(_RUN), y.split(_RUN), strict=True)
    value = sum(float(torch.dot(left, right)) for left, right in runs)
    return value if 1e-20 < abs(value) < 1e30 else float(torch.dot(x.double(), y.double()))


def count_support(to: Moments, changed: np.ndarray, near_zero: np.ndarray) -> None:
    """Add a block's changed entries and those near zero in the base; both bool [n]."""
    to.changed += int(np.count_nonzero(changed))
    to.near_zero += int(np.count_nonzero(near_zero))
    to.changed_near_zero += int(np.count_nonzero(changed & near_zero))


class BlockStatistics:
    """Adds blocks to `Moments`, in buffers of its own."""

    def __init__(self) -> None:
        self._absolute = torch.empty(BLOCK)
        self._bits = torch.empty(BLOCK, dtype=torch.int32)
        self._mask = np.empty(BLOCK, dtype=bool)
        self._rounded = [torch.empty(BLOCK, dtype=torch.bfloat16) for _ in range(2)]

    def add(
        self, to: Moments, base: torch.Tensor, delta: torch.Tensor, tuned: torch.Tensor, bf16: bool
    ) -> bool:
        """Add one block to `to`; False (and `to` spoilt) if it holds NaN or infinity.

        base, delta, tuned: float32 [n], n ≤ BLOCK, not changed. `bf16`: both were stored in
        bfloat16, so unchanged at bfloat16 resolution means Δ = 0. Subnormal float32 entries may
        count as changed.
        """
        n = delta.numel()
        absolute, mask = self._absolute[:n], self._mask[:n]
        torch.abs(delta, out=absolute)
        total = float(absolute.sum())
        if not np.isfinite(total) and not bool(torch.isfinite(delta).all()):
            return False
        to.count += n
        to.base_sq += dot(base, base)
        to.delta_sq += dot(delta, delta)
        wide = not np.isfinite(total)  # finite entries whose float32 sum overflows
        to.delta_sum += float(delta.double().sum() if wide else delta.sum())
        to.delta_abs_sum += float(absolute.double().sum()) if wide else total
        to.delta_max = max(to.delta_max, float(absolute.numpy().max(initial=0.0)))
        np.less_equal(absolute.numpy(), np.float32(SMALL), out=mask)
        to.unchanged_small += int(np.count_nonzero(mask))
        # The histogram below still wants |Δ|, so |w₀| goes where the bits come later.
        limit = torch.abs(base, out=self._bits[:n].view(torch.float32)).mul_(SMALL)
        np.less_equal(absolute.numpy(), limit.numpy(), out=mask)
        to.unchanged_relative += int(np.count_nonzero(mask))
        to.unchanged_bf16 += self._same(base, delta, tuned, bf16)
        to.histogram.add(absolute, self._bits[:n])
        return True

    def _same(
        self, base: torch.Tensor, delta: torch.Tensor, tuned: torch.Tensor, bf16: bool
    ) -> int:
        n = delta.numel()
        mask = self._mask[:n]
        if bf16:
            np.equal(delta.numpy(), 0, out=mask)
            return int(np.count_nonzero(mask))
        left, right = (r[:n] for r in self._rounded)
        left.copy_(base)
        right.copy_(tuned)
        np.equal(left.view(torch.int16).numpy(), right.view(torch.int16).numpy(), out=mask)
        same = int(np.count_nonzero(mask))
        # +0 and -0 have different bits but are equal.
        np.equal(base.numpy(), 0, out=mask)
        if mask.any():
            zeros = np.flatnonzero(mask)
            before, after = base.numpy()[zeros], tuned.numpy()[zeros]
            same += int(np.sum((after == 0) & (np.signbit(before) != np.signbit(after))))
        return same
