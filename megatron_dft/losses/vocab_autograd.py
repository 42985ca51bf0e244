"""The autograd function behind vocab_parallel.py: chunked passes and one collective.

Shapes: T tokens, V this rank's part of the vocabulary, C rows of statistics.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.vocab_gradient import LogitGradient
from megatron_dft.losses.vocab_statistics import (
    Wanted,
    finish,
    merge,
    row_chunks,
    shard_statistics,
    statistics_dtype,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments that are not tensors."""

    want: Wanted
    group: dist.ProcessGroup | None
    vocab_start: int
    ignore_index: int
    chunk_bytes: int | None
    overwrite_logits: bool


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of the group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def gather_statistics(stats_CT: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, C, T] from each rank's [C, T]: the one statistics collective."""
    ranks = world_size(group)
    if ranks == 1:
        return stats_CT.unsqueeze(0)
    gathered = stats_CT.new_empty(ranks, *stats_CT.shape)
    dist.all_gather_into_tensor(gathered.view(-1), stats_CT.reshape(-1), group=group)
    return gathered


class _Rows:
    """The supervised rows of a [T, V] tensor, read chunk by chunk through buffers that stay."""

    def __init__(self, supervised_T: Tensor, chunk_bytes: int | None):
        # One synchronisation on a GPU: the number of supervised tokens sets every later shape.
        self.index = supervised_T.nonzero().squeeze(1)
        self.all = len(self.index) == len(supervised_T)
        self.chunk_bytes = chunk_bytes

    def of(self, values_T: Tensor) -> Tensor:
        return values_T if self.all else values_T[self.index]

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """A new tensor of all tokens: the supervised ones' values, 0 elsewhere."""
        if self.all:
            return values.clone()
        return values.new_zeros(tokens).index_copy_(0, self.index, values)

    def chunks(self, source_TV: Tensor):
        return row_chunks(len(self.index), source_TV.shape[1], self.chunk_bytes, source_TV.device)

    def load(self, source_TV: Tensor, chunk: slice, kept: Tensor | None) -> Tensor:
        """These rows: a view where every row is supervised, else a copy, in `kept` if it fits."""
        if self.all:
            return source_TV[chunk]
        index = self.index[chunk]
        if kept is None or kept.dtype != source_TV.dtype or len(kept) < len(index):
            return source_TV.index_select(0, index)
        return torch.index_select(source_TV, 0, index, out=kept[: len(index)])


def _buffer(like_TV: Tensor, kept: Tensor | None) -> Tensor:
    """A temporary in the statistics dtype: `kept` again if it is large enough."""
    if kept is None or len(kept) < len(like_TV):
        kept = torch.empty(like_TV.shape, dtype=statistics_dtype(like_TV), device=like_TV.device)
    return kept[: len(like_TV)]


class VocabParallelStatistics(torch.autograd.Function):
    """(logits [T, V], target [T], reference logits [T, V] or None, Call) → log p, whether that is
    the largest, entropy, entropy of the top k, Σp², KL: [T] each or None."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, target_T: Tensor, reference_TV: Tensor | None, call: Call):
        # A statistic used as a constant then has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        rows = _Rows(target_T != call.ignore_index, call.chunk_bytes)
        target = rows.of(target_T)
        local = logits_TV.new_empty(call.want.count, len(target), dtype=statistics_dtype(logits_TV))
        # e^{z−m} written over the logits is all that the gradient of log p needs.
        same_dtype = logits_TV.dtype == local.dtype
        keep_exp = (
            call.overwrite_logits
            and ctx.needs_input_grad[0]
            and rows.all
            and same_dtype
            and call.want == Wanted()
        )
        part_is_copy = same_dtype and not rows.all
        part = buffer = reference = None
        for chunk in rows.chunks(logits_TV):
            part = rows.load(logits_TV, chunk, part)
            # A copy of fp32 rows is lost without harm: one buffer for the whole pass.
            buffer = part if keep_exp or part_is_copy else _buffer(part, buffer)
            if reference_TV is not None:
                reference = rows.load(reference_TV, chunk, reference)
            local[:, chunk] = shard_statistics(
                part,
                target[chunk],
                call.vocab_start,
                call.want,
                buffer,
                reference,
            )
        gathered = gather_statistics(local, call.group)
        done = finish(merge(gathered, call.want), target, call.want)
        rank = 0 if call.group is None else dist.get_rank(call.group)
        ctx.gradient = LogitGradient.of(done, gathered, call.want, rank, target, call.vocab_start)
        if keep_exp:
            ctx.gradient.shard_maximum_T = local[0]
        ctx.call, ctx.rows = call, rows
        ctx.save_for_backward(logits_TV, reference_TV)
        values = (
            done.log_prob,
            done.is_top1,
            done.entropy,
            done.entropy_top,
            done.sum_sq_prob,
            done.kl,
        )
        out = tuple(None if v is None else rows.spread(v, len(target_T)) for v in values)
        ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        logits_TV, reference_TV = ctx.saved_tensors
        rows, overwrite = ctx.rows, ctx.call.overwrite_logits
        upstream = [None if g is None else rows.of(g) for g in (grads[0], *grads[2:])]
        ctx.gradient.set_upstream(*upstream)
        if overwrite:
            out = logits_TV.detach()
        else:
            out = torch.empty_like(logits_TV) if rows.all else torch.zeros_like(logits_TV)
        same_dtype = out.dtype == statistics_dtype(out)
        part = buffer = reference = None
        for chunk in rows.chunks(logits_TV):
            part = rows.load(logits_TV, chunk, part)
            if same_dtype:  # the gradient's own place, or a copy of the rows
                buffer = out[chunk] if rows.all else part
            else:
                buffer = _buffer(part, buffer)
            if reference_TV is not None:
                reference = rows.load(reference_TV, chunk, reference)
            gradient = ctx.gradient.chunk(part, chunk, buffer, reference)
            if not rows.all:
                out.index_copy_(0, rows.index[chunk], gradient.to(out.dtype))
            elif not same_dtype:
                out[chunk] = gradient
        if overwrite and not rows.all:
            ignored = torch.ones(len(out), dtype=torch.bool, device=out.device)
            ignored[rows.index] = False
            out.index_fill_(0, ignored.nonzero().squeeze(1), 0.0)
        return out, None, None, None
