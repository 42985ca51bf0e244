"""What an objective may know about each token, and the reductions over conversations and batches.

Shapes: every tensor of a `TokenStats` has one shape, usually Megatron's [b, s/cp] or, in the
chunked head, [T]: this context-parallel rank's tokens. All values are already reduced over the
vocabulary shards, hence equal on every tensor-parallel rank, and so is all that follows.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Fields of TokenStats that come from the whole distribution over the vocabulary, and those that
# come from a frozen reference model.
VOCABULARY_STATISTICS = ("entropy", "entropy_top20", "sum_sq_prob")
REFERENCE_STATISTICS = frozenset(("reference_log_prob", "kl"))
# What the data says of a token's row.
ROW_STATISTICS = frozenset(("reward",))


_PER_TOKEN = (
    "entropy", "entropy_top20", "sum_sq_prob", "reference_log_prob", "kl", "reward"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of the target tokens; never mutated.

    Attributes:
        log_prob: log π_θ(y_t | ·) = −CE, fp32; the tensor that carries the gradient. Where `mask`
            is 0 it may hold anything, inf and NaN included.
        mask: non-zero where the token is supervised (any dtype).
        segment_ids: int64, the conversation of each token, 0 ≤ id < num_segments, numbered alike
            on all context-parallel ranks and not reused in another row. None: each row of a 2-D
            tensor is one conversation, and a 1-D tensor is one conversation.
        num_segments: number of conversations; given, it saves a device synchronisation (and under
            context parallelism a collective).
        entropy: H(π_θ) in nats. entropy_top20: entropy of the 20 likeliest tokens, renormalised.
        sum_sq_prob: Σ_k p_k². These three are used as constants.
        reference_log_prob: log π_ref(y_t | ·) of the base or old model.
        kl: KL(π_base ‖ π_θ) over the full vocabulary; carries a gradient.
        reward: of the row that the token is of, of either sign.
        full_weight: non-zero (any dtype) where the objective's weight is not asked: the token takes
            w = 1, plain −log p. No other token's weight changes by it.
        context_parallel_group: ranks that hold the other parts of the same conversations.
        batch_group: ranks over which batch statistics (TALR's median) are taken. None: the
            context-parallel group, so that the figure is one micro-batch's whatever the layout. The
            data × context-parallel group makes it the figure of all micro-batches of that moment.
    """

    log_prob: Tensor
    mask: Tensor
    segment_ids: Tensor | None = None
    num_segments: int | None = None
    entropy: Tensor | None = None
    entropy_top20: Tensor | None = None
    sum_sq_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None
    kl: Tensor | None = None
    reward: Tensor | None = None
    full_weight: Tensor | None = None
    context_parallel_group: dist.ProcessGroup | None = None
    batch_group: dist.ProcessGroup | None = None

    @property
    def prob(self) -> Tensor:
        """p = π_θ(y_t | ·), at most 1 even where rounding left log p a hair above 0."""
        return self.log_prob.clamp(max=0.0).exp()

    def supervised_only(self) -> "TokenStats":
        """The same with a bool mask, 0 where it is False, and no gradient but to `kl`."""
        supervised = self.mask.to(torch.bool)
        log_prob = torch.where(supervised, self.log_prob.detach(), 0.0)
        found: dict[str, Any] = {}
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                value = value if name == "kl" else value.detach().to(log_prob.dtype)
                found[name] = torch.where(supervised, value, 0.0)
        return dataclasses.replace(self, log_prob=log_prob, mask=supervised, **found)


class Terms(NamedTuple):
    """What an objective says about each token.

    The gradient of its loss is `weight` × the gradient of −log p (+ that of `extra`). Objectives
    see detached log-probabilities, so `weight` is the whole of it and no detach can be forgotten.
    `value` is what the loss reads, for those whose value is not weight × −log p.
    """

    weight: Tensor
    value: Tensor | None = None
    extra: Tensor | None = None


class TokenLoss(NamedTuple):
    """`loss`: fp32, not reduced, 0 where not supervised, differentiable. `weight`: detached
    ∂loss/∂(−log p), 0 where not supervised."""

    loss: Tensor
    weight: Tensor


def _is_spread(group: dist.ProcessGroup | None) -> bool:
    return group is not None and dist.get_world_size(group) > 1


def _segments(stats: TokenStats) -> tuple[Tensor, int]:
    """Flat segment ids and their number, the same on every context-parallel rank."""
    shape = stats.log_prob.shape
    if stats.segment_ids is None:
        rows = shape[0] if len(shape) > 1 else 1
        ids = torch.arange(rows, device=stats.log_prob.device)
        return ids.repeat_interleave(stats.log_prob.numel() // max(rows, 1)), rows
    ids = stats.segment_ids.reshape(-1)
    if stats.num_segments is not None:
        return ids, stats.num_segments
    highest = ids.max() if ids.numel() else ids.new_full((), -1)
    if _is_spread(stats.context_parallel_group):
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=stats.context_parallel_group)
    return ids, int(highest) + 1


def segment_mean(stats: TokenStats, values: Tensor) -> Tensor:
    """Mean of `values` over the supervised tokens of each token's conversation, same shape.

    One all-reduce of [2, num_segments] when a conversation is split over context-parallel ranks.
    Conversations without a supervised token get 0.
    """
    total, count = _segment_totals(stats, values)
    return total / count.clamp(min=1)


def segment_sum(stats: TokenStats, values: Tensor) -> Tensor:
    """Sum of `values` over the supervised tokens of each token's conversation, same shape."""
    return _segment_totals(stats, values)[0]


def segment_count(stats: TokenStats) -> Tensor:
    """Supervised tokens of each token's conversation, log_prob's shape."""
    return _segment_totals(stats, stats.log_prob)[1]


def segment_table(stats: TokenStats, *values: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 [len(values) + 1, S], int64 [T]): each conversation's sums over its supervised
    tokens, their number last, and the conversation of each token, flat.

    One all-reduce where conversations are split over context-parallel ranks.
    """
    ids, number = _segments(stats)
    supervised = stats.mask.reshape(-1).to(torch.bool)
    # float64: the order of index_add_'s atomics then stays below fp32's last bit, so that
    # tensor-parallel ranks agree on the weight.
    ones = torch.ones_like(ids, dtype=torch.float64)
    rows = torch.stack([*(v.reshape(-1).double() for v in values), ones])
    totals = rows.new_zeros(len(rows), number)
    totals.index_add_(1, ids, torch.where(supervised, rows, 0.0))
    if _is_spread(stats.context_parallel_group):
        dist.all_reduce(totals, group=stats.context_parallel_group)
    return totals, ids


def _segment_totals(stats: TokenStats, values: Tensor) -> tuple[Tensor, Tensor]:
    totals, ids = segment_table(stats, values)
    total, count = totals[:, ids].to(values.dtype).unbind(0)
    return total.view_as(values), count.view_as(values)


def log_ratio(stats: TokenStats) -> Tensor:
    """log p − log p_ref, finite: 0 where both are impossible, ±1e30 where one is."""
    assert stats.reference_log_prob is not None
    ratio = stats.log_prob - stats.reference_log_prob
    # A conversation's mean of +inf and −inf would be NaN.
    return torch.nan_to_num(ratio, nan=0.0, posinf=1e30, neginf=-1e30)


def batch_median(stats: TokenStats, values: Tensor) -> Tensor:
    """Lower median of `values` over all supervised tokens of the batch group, a scalar tensor.

    One all-gather of the per-token values where the group has more than one rank (all ranks hold
    equally many tokens); no device synchronisation. 0 if no token is supervised.
    """
    supervised = stats.mask.reshape(-1).to(torch.bool)
    flat = torch.where(supervised, values.reshape(-1), torch.inf).contiguous()
    group = stats.batch_group or stats.context_parallel_group
    if _is_spread(group):
        gathered = flat.new_empty(dist.get_world_size(group) * flat.numel())
        dist.all_gather_into_tensor(gathered, flat, group=group)
        flat = gathered
    if not flat.numel():
        return flat.new_zeros(())
    ordered = flat.sort().values
    middle = ((flat < torch.inf).sum() - 1).clamp(min=0) // 2
    median = ordered.gather(0, middle.view(1)).view(())
    return torch.where(median < torch.inf, median, 0.0)
