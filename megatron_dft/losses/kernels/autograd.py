"""The autograd function behind vocab_parallel.py on a GPU: two kernels and one collective.

Shapes: T tokens, V this rank's part of the vocabulary, C rows of statistics, k likeliest tokens.
Every row is passed to the kernels, which leave those without a target alone: nothing is gathered
and the host never waits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.kernels.gradient import Upstream, gradient_
from megatron_dft.losses.kernels.merge import finish, merge
from megatron_dft.losses.kernels.shard import statistics_of_shard
from megatron_dft.losses.vocab_autograd import Call, gather_statistics, world_size
from megatron_dft.losses.vocab_gradient import LogitGradient, top_term


class KernelStatistics(torch.autograd.Function):
    """(logits [T, V], target [T], reference logits [T, V] or None, Call) → log p, whether it is
    greedy decoding's choice, entropy, entropy of the top k, Σp², KL: [T] each or None."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, target_T: Tensor, reference_TV: Tensor | None, call: Call):
        ctx.set_materialize_grads(False)
        target = target_T.contiguous()
        parts, top, found = statistics_of_shard(
            logits_TV,
            target,
            call.vocab_start,
            call.want,
            reference_nV=reference_TV,
            ignore_index=call.ignore_index,
        )
        rank = 0
        if world_size(call.group) > 1:
            parts = gather_statistics(merge(parts, call.want), call.group)
            rank = dist.get_rank(call.group)
        done, ctx.stats = finish(parts, target, call.want, call.ignore_index)
        if call.want.top_k:
            gradient = LogitGradient.of(done, parts, call.want, rank, target, call.vocab_start)
            ctx.top = (top, found, gradient.top_count_T, done)
        ctx.call, ctx.target = call, target
        ctx.save_for_backward(logits_TV, reference_TV)
        ctx.mark_non_differentiable(done.is_top1)
        values = (
            done.log_prob,
            done.is_top1,
            done.entropy,
            done.entropy_top,
            done.sum_sq_prob,
            done.kl,
        )
        # Copies: the rows that K2 reads may not change under a caller's hands.
        return tuple(v if v is None or v is done.is_top1 else v.clone() for v in values)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        logits_TV, reference_TV = ctx.saved_tensors
        call = ctx.call
        log_prob, _, entropy, g_top, sum_sq_prob, kl = (
            None if g is None else g.float().contiguous() for g in grads
        )
        out = logits_TV.detach() if call.overwrite_logits else torch.empty_like(logits_TV)
        gradient_(
            out,
            logits_TV,
            ctx.target,
            call.vocab_start,
            call.want,
            ctx.stats,
            Upstream(log_prob, entropy, sum_sq_prob, kl),
            reference_nV=reference_TV,
            ignore_index=call.ignore_index,
        )
        if g_top is not None and out.shape[1]:
            top, found, count, done = ctx.top
            term = top_term(done, top, g_top)
            position = torch.arange(len(top), device=top.device).unsqueeze(1)
            mine = (position < count) & (ctx.target != call.ignore_index)
            columns = found.clamp(min=0, max=out.shape[1] - 1)
            out.scatter_add_(1, columns.t(), torch.where(mine, term, 0.0).to(out.dtype).t())
        return out, None, None, None
