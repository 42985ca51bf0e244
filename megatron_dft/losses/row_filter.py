"""Rows of the logits whose gradient is nothing are left out of the backward, within a bound.

The gradient of −w·log p by a row's logits has the L1 norm 2·|w|·(1 − p), w the upstream gradient
with the objective's weight in it: for DFT it is small near p = 0 and near p = 1. The smallest are
dropped while together they are at most `bound` of the sum over all rows, so that the gradient of
the logits changes by at most that share of its L1 norm.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass
class RowFilter:
    """`bound`: share of the gradient's L1 norm that may be dropped."""

    bound: float
    # int64 [2] on the rows' device: rows dropped and rows in all since the last `take`.
    _counts: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.bound < 1.0:
            raise ValueError(
                f"--loss-row-filter: expected a share of at least 0 and below 1, got {self.bound}; "
                "1e-4 drops a ten-thousandth of the gradient at most"
            )

    def kept(self, upstream_n: Tensor, log_prob_n: Tensor) -> Tensor:
        """Ascending int64 index of the rows that stay; one device synchronisation.

        `upstream_n`: gradient of each row's log p; `log_prob_n`: log p of its target. Equal on all
        tensor-parallel ranks, and so is the result.
        """
        mass = 2.0 * upstream_n.double().abs() * -torch.expm1(log_prob_n.double().clamp(max=0.0))
        ordered, order = mass.sort(stable=True)
        # A row that is not a number stays, and with it the sum is none: nothing is dropped.
        gone = ordered.cumsum(0) <= self.bound * ordered.sum()
        keep = torch.ones_like(gone).index_put_((order,), ~gone)
        index = keep.nonzero().squeeze(1)
        dropped = gone.sum()
        counts = torch.stack([dropped, torch.full_like(dropped, len(mass))])
        self._counts = counts if self._counts is None else self._counts + counts
        return index

    def take(self, group: dist.ProcessGroup | None = None) -> float:
        """Share of the rows that were dropped since the last call; collective over `group`, all
        of whose ranks have had a backward since then, or none has."""
        counts, self._counts = self._counts, None
        if counts is None:
            return 0.0
        if group is not None:
            dist.all_reduce(counts, group=group)
        dropped, rows = counts.tolist()
        return dropped / rows if rows else 0.0


def in_place_order(kept: Tensor, rows: int) -> Tensor:
    """The kept rows such that those below len(kept) stand at their own place: the others fill the
    holes, and no row that is read is one that is written by another."""
    count = len(kept)
    low = kept[kept < count]
    order = torch.full((count,), -1, dtype=torch.int64, device=kept.device)
    order[low] = low
    order[order < 0] = kept[kept >= count]
    return order
