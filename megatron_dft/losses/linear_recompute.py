"""Hidden states → token statistics without the logits, recomputing them in the backward.

Shapes: n supervised tokens, h hidden size, V this rank's real vocabulary rows, B a block of them, C
rows of statistics. Logits exist as [n, B] blocks only: all tokens × some vocabulary, so that each
block's rows of dW are complete in one product (no accumulator wider than the weight) and only the
small d_hidden is summed over blocks.

Collectives: one all-gather of [C, n] in the forward (and one of the hidden states with sequence
parallelism), none for statistics in the backward, one all-reduce or reduce-scatter of d_hidden.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.linear_reference import ReferenceLogits
from megatron_dft.losses.main_grad import deliver
from megatron_dft.losses.row_filter import RowFilter
from megatron_dft.losses.supervised_rows import SupervisedRows
from megatron_dft.losses.vocab_autograd import gather_statistics
from megatron_dft.losses.vocab_gradient import LogitGradient
from megatron_dft.losses.vocab_statistics import (
    Finished,
    Wanted,
    finish,
    merge,
    row_chunks,
    shard_statistics,
    statistics_dtype,
)


@dataclasses.dataclass(frozen=True)
class Head:
    """What every design knows beside its tensors.

    `vocab_start`: id of the weight's first row; `real`: its rows that are no padding;
    `most_logits`: so many of them exist at a time; `memory` [bytes]: what they and the sums that
    cutting the vocabulary costs may take; `fuse_main_grad`: dW is added to the weight's main_grad
    where it has one; `reference`: the logits of the KL term.
    """

    rows: SupervisedRows
    group: dist.ProcessGroup | None
    want: Wanted
    vocab_start: int
    real: int
    most_logits: int
    memory: int
    fuse_main_grad: bool = False
    row_filter: RowFilter | None = None
    reference: ReferenceLogits | None = None

    def blocks(self, tokens: int) -> Iterator[slice]:
        """Slices of the real vocabulary rows."""
        size = max(1, self.most_logits // max(tokens, 1))
        for start in range(0, self.real, size):
            yield slice(start, min(start + size, self.real))


class _BlockLogits:
    """Logits [n, B] of one block after another, in one buffer."""

    def __init__(self, hidden_nh: Tensor, weight_Vh: Tensor) -> None:
        self.hidden, self.weight = hidden_nh, weight_Vh
        self.storage = hidden_nh.new_empty(0)

    def __call__(self, block: slice) -> Tensor:
        tokens, size = len(self.hidden), block.stop - block.start
        if self.storage.numel() < tokens * size:
            self.storage = self.hidden.new_empty(tokens * size)
        out = self.storage[: tokens * size].view(tokens, size)
        return torch.mm(self.hidden, self.weight[block].t(), out=out)


def fp32_chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, room for their fp32 values): the logits' own storage at once where they are fp32 or
    fp64, else chunk by chunk one small buffer."""
    dtype = statistics_dtype(logits)
    if logits.dtype == dtype:
        yield slice(0, len(logits)), logits
        return
    buffer = None
    for chunk in row_chunks(len(logits), logits.shape[1], None, logits.device):
        if buffer is None:
            shape = (chunk.stop - chunk.start, logits.shape[1])
            buffer = torch.empty(shape, dtype=dtype, device=logits.device)
        yield chunk, buffer[: chunk.stop - chunk.start]


def linear_statistics(
    hidden_nh: Tensor, weight_Vh: Tensor, target_n: Tensor, head: Head
) -> Finished:
    """Statistics of all n tokens, reduced over blocks and ranks."""
    tokens, parts = len(hidden_nh), []
    logits_of = _BlockLogits(hidden_nh, weight_Vh)
    for block in head.blocks(tokens):
        logits = logits_of(block)
        reference = None if head.reference is None else head.reference.block(block)
        part = hidden_nh.new_empty(head.want.count, tokens, dtype=statistics_dtype(hidden_nh))
        for chunk, scratch in fp32_chunks(logits):
            part[:, chunk] = shard_statistics(
                logits[chunk],
                target_n[chunk],
                head.vocab_start + block.start,
                head.want,
                scratch,
                None if reference is None else reference[chunk],
            )
        parts.append(part)
    if not parts:  # a rank whose rows are all padding
        empty = hidden_nh.new_empty(tokens, 0)
        none = torch.empty(tokens, 0, dtype=statistics_dtype(hidden_nh), device=empty.device)
        parts.append(shard_statistics(empty, target_n, head.vocab_start, head.want, none, none))
    local = merge(torch.stack(parts), head.want)
    gathered = gather_statistics(local, head.group)
    return finish(merge(gathered, head.want), target_n, head.want)


def linear_gradients(
    hidden_nh: Tensor,
    weight_Vh: Tensor,
    target_n: Tensor,
    head: Head,
    done: Finished,
    upstream_n: Tensor,
    needs: tuple[bool, bool],
    kl_upstream_n: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's (d_hidden [n, h] before the reduction over ranks, dW) for `upstream_n`, the
    gradient of each token's log p, and that of its KL; None for what is not needed."""
    tokens = len(hidden_nh)
    d_hidden = d_weight = None
    if needs[0]:
        d_hidden = torch.zeros_like(hidden_nh, dtype=statistics_dtype(hidden_nh))
    if needs[1]:
        d_weight = torch.empty_like(weight_Vh)
        d_weight[head.real :] = 0.0
    logits_of = _BlockLogits(hidden_nh, weight_Vh)
    for block in head.blocks(tokens):
        logits = logits_of(block)
        gradient = LogitGradient(
            done, target_n, head.vocab_start + block.start, None,
            reference_share=head.want.reference_share,
        )  # fmt: skip
        gradient.set_upstream(upstream_n, None, None, None, kl_upstream_n)
        reference = None
        if head.reference is not None and kl_upstream_n is not None:
            reference = head.reference.block(block)
        for chunk, scratch in fp32_chunks(logits):
            seen = None if reference is None else reference[chunk]
            result = gradient.chunk(logits[chunk], chunk, scratch, seen)
            if result.dtype != logits.dtype:
                logits[chunk] = result
        if d_hidden is not None:
            if d_hidden.dtype == logits.dtype:
                d_hidden.addmm_(logits, weight_Vh[block])
            else:
                d_hidden += torch.mm(logits, weight_Vh[block])
        if d_weight is not None:
            torch.mm(logits.t(), hidden_nh, out=d_weight[block])
    return None if d_hidden is None else d_hidden.to(hidden_nh.dtype), d_weight


def _of_rows(done: Finished, index: Tensor) -> Finished:
    """What `linear_gradients` reads of these rows."""
    return Finished(
        maximum=done.maximum[index],
        sum_exp=done.sum_exp[index],
        log_prob=done.log_prob[index],
        is_top1=done.is_top1[index],
    )


class LinearStatistics(torch.autograd.Function):
    """(hidden [N, h], weight, target [T], Head) → log p and KL [T], differentiable, and the
    constants whether log p is greedy decoding's choice, entropy, that of the top k and Σp²; [T] or
    None: log p, top-1, entropy, entropy of the top k, Σp², KL."""

    @staticmethod
    def forward(ctx, hidden_Nh: Tensor, weight_Vh: Tensor, target_T: Tensor, head: Head):
        ctx.set_materialize_grads(False)
        rows, reference = head.rows, head.reference
        target = rows.of(target_T)
        if reference is not None:
            reference.begin()
        done = linear_statistics(rows.gather(hidden_Nh), weight_Vh, target, head)
        if reference is not None:
            reference.end()
        ctx.head, ctx.done, ctx.target, ctx.weight = head, done, target, weight_Vh
        ctx.save_for_backward(hidden_Nh, weight_Vh)
        return spread_outputs(ctx, rows, done)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        hidden_Nh, weight_Vh = ctx.saved_tensors
        head, rows = ctx.head, ctx.head.rows
        upstream, kl_upstream = upstream_of(rows, grads, ctx.done.log_prob)
        hidden, target, done, kept = rows.gather(hidden_Nh), ctx.target, ctx.done, None
        tokens = len(hidden)
        if head.row_filter is not None:
            kept = head.row_filter.kept(upstream, done.log_prob)
            hidden, target, upstream = hidden[kept], target[kept], upstream[kept]
            done = _of_rows(done, kept)
        if head.reference is not None and kl_upstream is not None:
            head.reference.begin()
        d_hidden, d_weight = linear_gradients(
            hidden, weight_Vh, target, head, done, upstream, ctx.needs_input_grad[:2], kl_upstream
        )
        if head.reference is not None:
            head.reference.end()
        if d_hidden is not None:
            if kept is not None:
                d_hidden = d_hidden.new_zeros(tokens, d_hidden.shape[1]).index_copy_(
                    0, kept, d_hidden
                )
            d_hidden = rows.reduce(d_hidden)
        return d_hidden, deliver(ctx.weight, d_weight, head.fuse_main_grad), None, None


def spread_outputs(ctx, rows: SupervisedRows, done: Finished) -> tuple[Tensor | None, ...]:
    """(log p, top-1, entropy, that of the top k, Σp², KL) [T]; the first and the last have
    gradients."""
    constants = (done.is_top1, done.entropy, done.entropy_top, done.sum_sq_prob)
    values = (done.log_prob, *constants, done.kl)
    out = tuple(None if v is None else rows.spread(v) for v in values)
    ctx.mark_non_differentiable(*(v for v in out[1:-1] if v is not None))
    return out


def upstream_of(
    rows: SupervisedRows, grads: tuple[Tensor | None, ...], log_prob_n: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients [n] of log p (zeros where none came) and of the KL, of `spread_outputs`."""
    first, kl = grads[0], grads[-1]
    upstream = torch.zeros_like(log_prob_n) if first is None else rows.of(first)
    return upstream, None if kl is None else rows.of(kl)
