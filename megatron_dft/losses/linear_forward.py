"""Hidden states → loss with the gradient taken in the forward: three products instead of four.

Shapes: n supervised tokens, h hidden size, V real vocabulary rows, c tokens of a chunk. Logits
exist as [c, V] chunks. Possible where a chunk's weights are known from the chunk alone: the whole
vocabulary on this rank, and an objective without batch or conversation statistics.

With e = e^{z−m}, S = Σe and w the objective's weight, the gradient of a token's loss is
dz = (w/S)·(e − S·onehot): the factor w/S is put on the rows of the small products, so e is never
read again to be scaled.

The gradients are right for one upstream gradient shared by all tokens, which is what a summed or
averaged loss sends back. The backward checks that, and recomputes if it is not so.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_dft.losses.linear_recompute import Head, fp32_chunks, linear_gradients
from megatron_dft.losses.main_grad import deliver
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_gradient import LogitGradient
from megatron_dft.losses.vocab_statistics import (
    Finished,
    finish,
    merge,
    shard_statistics,
    statistics_dtype,
    target_position,
)
from megatron_dft.losses.weighting import Objective


def _token_stats(done: Finished, fields: dict[str, Any]) -> TokenStats:
    return TokenStats(
        log_prob=done.log_prob,
        mask=torch.ones_like(done.log_prob, dtype=torch.bool),
        entropy_top20=done.entropy_top,
        sum_sq_prob=done.sum_sq_prob,
        **fields,
    )


@dataclasses.dataclass
class _Gradients:
    """Sums over the chunks of the forward: d_hidden [n, h] and dW, the latter in fp32 for bf16."""

    d_hidden: Tensor | None
    d_weight: Tensor | None
    real: int

    @classmethod
    def empty(cls, hidden_nh: Tensor, weight_Vh: Tensor, real: int, needs: tuple[bool, bool]):
        wide = statistics_dtype(weight_Vh)
        return cls(
            torch.empty_like(hidden_nh) if needs[0] else None,
            torch.empty_like(weight_Vh, dtype=wide) if needs[1] else None,
            real,
        )

    def add(self, chunk: slice, dz: Tensor, factor: Tensor | None, hidden, weight) -> None:
        """Add a chunk whose logit gradient is factor · dz [c, V]."""
        rows = hidden[chunk]
        if self.d_hidden is not None:
            out = self.d_hidden[chunk]
            torch.mm(dz, weight[: self.real], out=out)
            if factor is not None:
                out.mul_(factor.unsqueeze(1))
        if self.d_weight is not None:
            if factor is not None:
                rows = rows * factor.unsqueeze(1)
            if chunk.start == 0:  # spares a pass that would set all of dW to 0
                self.d_weight[self.real :] = 0.0
            if self.d_weight.dtype == dz.dtype:
                d_weight = self.d_weight[: self.real]
                if chunk.start == 0:
                    torch.mm(dz.t(), rows, out=d_weight)
                else:
                    d_weight.addmm_(dz.t(), rows)
            else:
                # By rows of dW, for the product comes in bf16 and is added in fp32.
                step = max(1, dz.numel() // max(rows.shape[1], 1))
                for start in range(0, self.real, step):
                    block = slice(start, min(start + step, self.real))
                    product = torch.mm(dz[:, block].t(), rows)
                    if chunk.start == 0:
                        self.d_weight[block] = product
                    else:
                        self.d_weight[block] += product


def _chunk_statistics(logits: Tensor, target: Tensor, head: Head) -> Finished:
    """Statistics of a chunk [c, V]; fp32 or fp64 logits become e^{z−m}."""
    packed = torch.empty(
        head.want.count, len(logits), dtype=statistics_dtype(logits), device=logits.device
    )
    for part, scratch in fp32_chunks(logits):
        packed[:, part] = shard_statistics(
            logits[part], target[part], head.vocab_start, head.want, scratch
        )
    return finish(merge(packed.unsqueeze(0), head.want), target, head.want)


def _logit_gradient_(
    logits: Tensor, done: Finished, weight: Tensor, target: Tensor, head: Head
) -> None:
    """Overwrite bf16 or fp16 logits [c, V] with weight · (softmax − onehot)."""
    gradient = LogitGradient(done, target, head.vocab_start, None)
    gradient.set_upstream(-weight, None, None, None, None)
    for part, scratch in fp32_chunks(logits):
        logits[part] = gradient.chunk(logits[part], part, scratch, None)


class LinearLoss(torch.autograd.Function):
    """(hidden [T, h], weight, target [T], Head, Objective, per-token fields) → loss [T] and the
    constants weight [T], log p [T] and whether it is greedy decoding's choice [T]."""

    @staticmethod
    def forward(
        ctx,
        hidden_Th: Tensor,
        weight_Vh: Tensor,
        target_T: Tensor,
        head: Head,
        objective: Objective,
        fields: dict[str, Any],
    ):
        rows = head.rows
        hidden, target = rows.gather(hidden_Th), rows.of(target_T)
        fields = {name: rows.of(value) for name, value in fields.items()}
        tokens = len(hidden)
        dtype = statistics_dtype(hidden)
        in_place = hidden.dtype == dtype
        gradients = _Gradients.empty(hidden, weight_Vh, head.real, ctx.needs_input_grad[:2])
        size = max(1, head.most_logits // max(head.real, 1))
        buffer = hidden.new_empty(min(size, tokens), head.real)
        results = torch.empty(5, tokens, dtype=dtype, device=hidden.device)
        is_top1 = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
        for start in range(0, tokens, size):
            chunk = slice(start, min(start + size, tokens))
            logits = buffer[: chunk.stop - start]
            torch.mm(hidden[chunk], weight_Vh[: head.real].t(), out=logits)
            done = _chunk_statistics(logits, target[chunk], head)
            terms = objective.terms(
                _token_stats(done, {name: value[chunk] for name, value in fields.items()})
            )
            assert terms.value is not None
            results[:, chunk] = torch.stack(
                [done.maximum, done.sum_exp, done.log_prob, terms.weight, terms.value]
            )
            is_top1[chunk] = done.is_top1
            factor = None
            if in_place:
                each = torch.arange(len(logits), device=logits.device)
                held, column = target_position(target[chunk], head.vocab_start, head.real)
                logits[each, column] -= torch.where(held, done.sum_exp, 0.0)
                factor = terms.weight / done.sum_exp
            else:
                _logit_gradient_(logits, done, terms.weight, target[chunk], head)
            gradients.add(chunk, logits, factor, hidden, weight_Vh)
        if not tokens and gradients.d_weight is not None:
            gradients.d_weight.zero_()
        maximum, sum_exp, log_prob, weight, value = results
        done = Finished(maximum, sum_exp, log_prob, is_top1)
        if gradients.d_weight is not None:
            gradients.d_weight = gradients.d_weight.to(weight_Vh.dtype)
        ctx.head, ctx.done, ctx.target, ctx.token_weight = head, done, target, weight
        ctx.weight = weight_Vh
        ctx.gradients = gradients
        ctx.save_for_backward(hidden_Th, weight_Vh)
        outputs = tuple(rows.spread(x) for x in (value, weight, log_prob, is_top1))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor):
        hidden_Th, weight_Vh = ctx.saved_tensors
        head, rows = ctx.head, ctx.head.rows
        upstream = rows.of(grads[0])
        gradients, ctx.gradients = ctx.gradients, None
        # One synchronisation on a GPU, for a gradient that is never silently wrong.
        if gradients is not None and bool((upstream == upstream[:1]).all()):
            d_hidden, d_weight = gradients.d_hidden, gradients.d_weight
            if len(upstream):
                for gradient in (d_hidden, d_weight):
                    if gradient is not None:
                        gradient.mul_(upstream[0])
        else:
            d_hidden, d_weight = linear_gradients(
                rows.gather(hidden_Th),
                weight_Vh,
                ctx.target,
                head,
                ctx.done,
                -ctx.token_weight * upstream,
                ctx.needs_input_grad[:2],
            )
        d_hidden = None if d_hidden is None else rows.reduce(d_hidden)
        d_weight = deliver(ctx.weight, d_weight, head.fuse_main_grad)
        return d_hidden, d_weight, None, None, None, None
