"""The ways to a DFT loss that tools/benchmark_loss.py compares, from hidden states or logits.

Each method maps (hidden [T, h] or logits [T, V/tp], weight [V/tp, h], labels [T], mask [T], group,
chunk size) to the scalar loss Σ p·CE / number of supervised tokens; its backward is timed with it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.vocab_parallel import vocab_parallel_dft_loss

DFT = registry.get("dft")


def _mean_dft(cross_entropy: Tensor, mask: Tensor) -> Tensor:
    weight = torch.exp(-cross_entropy.detach())
    return (weight * cross_entropy * mask).sum() / mask.sum().clamp(min=1)


def native_unfused(logits, labels, mask, group) -> Tensor:
    """Megatron's cross entropy (three all-reduces), the weight on top."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    losses = vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, group)
    return _mean_dft(losses.squeeze(1), mask)


def native_fused(logits, labels, mask, group) -> Tensor:
    """Megatron's own fused cross entropy (two all-reduces, bf16 gradient), the weight on top."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    losses = fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), group)
    return _mean_dft(losses.squeeze(1), mask)


def full_log_softmax(logits, labels, mask, group) -> Tensor:
    """log_softmax of everything, then a gather: what trainers without tensor parallelism do."""
    log_probs = logits.float().log_softmax(-1)
    return _mean_dft(-log_probs.gather(1, labels.unsqueeze(1)).squeeze(1), mask)


class _ChunkedLogProb(torch.autograd.Function):
    """log p of the targets chunk by chunk over tokens: the softmax is taken again in the backward,
    with its collectives; fp32 throughout. The scheme of RL trainers on Megatron."""

    @staticmethod
    def forward(ctx, logits, labels, group, chunk_size):
        start = dist.get_rank(group) * logits.shape[1]
        local = labels - start
        held = (local >= 0) & (local < logits.shape[1])
        local = torch.where(held, local, 0)
        out = []
        for part, column, own in zip(
            logits.split(chunk_size), local.split(chunk_size), held.split(chunk_size), strict=True
        ):
            log_probs = _ChunkedLogProb._log_softmax(part, group)
            chosen = log_probs.gather(1, column.unsqueeze(1)).squeeze(1)
            out.append(torch.where(own, chosen, 0.0))
        log_prob = torch.cat(out)
        dist.all_reduce(log_prob, group=group)
        ctx.save_for_backward(logits, local, held)
        ctx.group, ctx.chunk_size = group, chunk_size
        return log_prob

    @staticmethod
    def _log_softmax(part, group):
        shifted = part.float()
        maximum = shifted.amax(1, keepdim=True)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shifted = shifted - maximum
        total = shifted.exp().sum(1, keepdim=True)
        dist.all_reduce(total, group=group)
        return shifted - total.log()

    @staticmethod
    def backward(ctx, *grads):
        logits, local, held = ctx.saved_tensors
        out = []
        for part, column, own, grad in zip(
            *(x.split(ctx.chunk_size) for x in (logits, local, held, grads[0])), strict=True
        ):
            gradient = -_ChunkedLogProb._log_softmax(part, ctx.group).exp()
            gradient.scatter_add_(1, column.unsqueeze(1), own.float().unsqueeze(1))
            out.append((gradient * grad.unsqueeze(1)).to(part.dtype))
        return torch.cat(out), None, None, None


def chunked_log_prob(logits, labels, mask, group, chunk_size) -> Tensor:
    """Chunked log-probabilities, the weight on top."""
    return _mean_dft(-_ChunkedLogProb.apply(logits, labels, group, chunk_size), mask)


def vocab_parallel(logits, labels, mask, group, overwrite: bool = False) -> Tensor:
    """This package, from logits."""
    target = torch.where(mask.bool(), labels, -100)
    loss, _ = vocab_parallel_dft_loss(logits, target, group, overwrite_logits=overwrite)
    return loss.sum() / mask.sum().clamp(min=1)


def transformer_engine(logits, labels, mask, group) -> Tensor:
    """TE's Triton cross entropy, the weight on top."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    losses = parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, group)
    return _mean_dft(losses.squeeze(1), mask)


def liger(logits, labels, mask, group) -> Tensor:
    """Liger's Triton cross entropy, one rank only, the weight on top."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _mean_dft(liger_cross_entropy(logits, labels, reduction="none"), mask)


def from_logits(name: str, chunk_size: int) -> Callable[..., Tensor]:
    """(logits, labels, mask, group) → loss of the method of that name."""
    if name == "chunked-log-prob":
        return lambda *a: chunked_log_prob(*a, chunk_size)
    if name == "vocab-parallel-overwrite":
        return lambda *a: vocab_parallel(*a, overwrite=True)
    return {
        "native-unfused": native_unfused,
        "native-fused": native_fused,
        "full-log-softmax": full_log_softmax,
        "vocab-parallel": vocab_parallel,
        "transformer-engine": transformer_engine,
        "liger": liger,
    }[name]


class _ColumnParallel(torch.autograd.Function):
    """hidden @ weight.T with the all-reduce of d_hidden that an output layer does."""

    @staticmethod
    def forward(ctx, hidden, weight, group):
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight = ctx.saved_tensors
        d_hidden = grads[0] @ weight
        if dist.get_world_size(ctx.group) > 1:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, grads[0].t() @ hidden, None


def from_hidden(name: str, chunk_size: int) -> Callable[..., Tensor]:
    """(hidden, weight, labels, mask, group) → loss of the method of that name."""
    if name.startswith("linear-head"):
        design = name.removeprefix("linear-head-")

        def head(hidden, weight, labels, mask, group):
            out = linear_head_loss(
                hidden,
                weight,
                labels,
                objective=DFT,
                mask=mask,
                group=group,
                chunk_size=chunk_size,
                design=design,
            )
            return out.loss.sum() / mask.sum().clamp(min=1)

        return head
    loss = from_logits(name, chunk_size)
    return lambda hidden, weight, *rest: loss(
        _ColumnParallel.apply(hidden, weight, rest[-1]), *rest
    )


LOGITS_METHODS = (
    "native-unfused",
    "native-fused",
    "full-log-softmax",
    "chunked-log-prob",
    "vocab-parallel",
    "vocab-parallel-overwrite",
)
HEAD_METHODS = ("linear-head-forward", "linear-head-recompute")
GPU_METHODS = {"transformer-engine": "transformer_engine", "liger": "liger_kernel"}
ONE_RANK = {"full-log-softmax", "linear-head-forward", "liger"}
