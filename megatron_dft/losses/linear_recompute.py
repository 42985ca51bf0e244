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
    """What both designs know beside their tensors.

    `vocab_start`: id of the weight's first row; `real`: its rows that are no padding; `chunk_size`
    [tokens]: at most chunk_size × V logits exist at a time.
    """

    rows: SupervisedRows
    group: dist.ProcessGroup | None
    want: Wanted
    vocab_start: int
    real: int
    chunk_size: int

    def blocks(self, tokens: int) -> Iterator[slice]:
        """Slices of the real vocabulary rows."""
        size = max(1, self.chunk_size * self.real // max(tokens, 1))
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
        part = hidden_nh.new_empty(head.want.count, tokens, dtype=statistics_dtype(hidden_nh))
        for chunk, scratch in fp32_chunks(logits):
            part[:, chunk] = shard_statistics(
                logits[chunk], target_n[chunk], head.vocab_start + block.start, head.want, scratch
            )
        parts.append(part)
    if not parts:  # a rank whose rows are all padding
        empty = hidden_nh.new_empty(tokens, 0)
        none = torch.empty(tokens, 0, dtype=statistics_dtype(hidden_nh), device=empty.device)
        parts.append(shard_statistics(empty, target_n, head.vocab_start, head.want, none))
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
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's (d_hidden [n, h] before the reduction over ranks, dW) for `upstream_n`, the
    gradient of each token's log p; None for what is not needed."""
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
        gradient = LogitGradient(done, target_n, head.vocab_start + block.start, None)
        gradient.set_upstream(upstream_n, None, None, None, None)
        for chunk, scratch in fp32_chunks(logits):
            result = gradient.chunk(logits[chunk], chunk, scratch, None)
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


class LinearStatistics(torch.autograd.Function):
    """(hidden [N, h], weight, target [T], Head) → log p [T], differentiable, and the constants
    whether it is the largest, entropy of the top k and Σp², [T] or None."""

    @staticmethod
    def forward(ctx, hidden_Nh: Tensor, weight_Vh: Tensor, target_T: Tensor, head: Head):
        rows = head.rows
        target = rows.of(target_T)
        done = linear_statistics(rows.gather(hidden_Nh), weight_Vh, target, head)
        ctx.head, ctx.done, ctx.target = head, done, target
        ctx.save_for_backward(hidden_Nh, weight_Vh)
        values = (done.is_top1, done.entropy_top, done.sum_sq_prob)
        constants = [None if v is None else rows.spread(v) for v in values]
        ctx.mark_non_differentiable(*(v for v in constants if v is not None))
        return rows.spread(done.log_prob), *constants

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        hidden_Nh, weight_Vh = ctx.saved_tensors
        head, rows = ctx.head, ctx.head.rows
        assert grads[0] is not None
        d_hidden, d_weight = linear_gradients(
            rows.gather(hidden_Nh),
            weight_Vh,
            ctx.target,
            head,
            ctx.done,
            rows.of(grads[0]),
            ctx.needs_input_grad[:2],
        )
        return None if d_hidden is None else rows.reduce(d_hidden), d_weight, None, None
