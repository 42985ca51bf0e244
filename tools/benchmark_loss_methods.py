"""The ways to a DFT loss that tools/benchmark_loss.py compares, from hidden states or logits.

Each method maps (hidden [T, h], weight [V/tp, h] or logits [T, V/tp], labels [T], mask [T], group)
to the scalar loss Σ p·CE / number of supervised tokens; its backward is timed with it.
"""

import functools
import importlib.util
from collections.abc import Callable

import benchmark_loss_peers as peers
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.vocab_parallel import vocab_parallel_dft_loss

Loss = Callable[..., Tensor]
DFT = registry.get("dft")


def native_unfused(logits, labels, mask, group) -> Tensor:
    """Megatron's cross entropy (three all-reduces), the weight on top."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    losses = vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, group)
    return peers.mean_dft(losses.squeeze(1), mask)


def native_fused(logits, labels, mask, group) -> Tensor:
    """Megatron's own fused cross entropy (two all-reduces, bf16 gradient), the weight on top."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    losses = fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), group)
    return peers.mean_dft(losses.squeeze(1), mask)


def full_log_softmax(logits, labels, mask, group) -> Tensor:
    """log_softmax of everything, then a gather: what trainers without tensor parallelism do."""
    log_probs = logits.float().log_softmax(-1)
    return peers.mean_dft(-log_probs.gather(1, labels.unsqueeze(1)).squeeze(1), mask)


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
    return peers.mean_dft(-_ChunkedLogProb.apply(logits, labels, group, chunk_size), mask)


def vocab_parallel(logits, labels, mask, group, overwrite: bool = False) -> Tensor:
    """This package, from logits."""
    target = torch.where(mask.bool(), labels, -100)
    loss, _ = vocab_parallel_dft_loss(logits, target, group, overwrite_logits=overwrite)
    return loss.sum() / mask.sum().clamp(min=1)


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


def _head(design: str, chunk_size: int | None, memory: int | None, fuse: bool = False) -> Loss:
    """This package, from hidden states."""

    def loss(hidden, weight, labels, mask, group):
        out = linear_head_loss(
            hidden,
            weight,
            labels,
            objective=DFT,
            mask=mask,
            group=group,
            chunk_size=chunk_size,
            loss_memory=memory,
            fuse_main_grad=fuse,
            design=design,
        )
        return out.loss.sum() / mask.sum().clamp(min=1)

    return loss


def _through(loss: Loss) -> Loss:
    """A loss of logits behind an output layer."""
    return lambda hidden, weight, *rest: loss(
        _ColumnParallel.apply(hidden, weight, rest[-1]), *rest
    )


BASELINE = "native-unfused"
MIB = 1 << 20
LOGITS: dict[str, Loss] = {
    BASELINE: native_unfused,
    "native-fused": native_fused,
    "full-log-softmax": full_log_softmax,
    "chunked-log-prob": chunked_log_prob,
    "vocab-parallel": vocab_parallel,
    "vocab-parallel-overwrite": functools.partial(vocab_parallel, overwrite=True),
}
# By name, with the module that has to be there.
LOGITS_PEERS = {
    "transformer-engine": (peers.transformer_engine, "transformer_engine"),
    "liger": (peers.liger, "liger_kernel"),
}
HEAD_PEERS = {
    "three-products": (peers.three_products, "torch"),
    "liger-flce": (peers.liger_flce, "liger_kernel"),
    "liger-scaled": (peers.liger_scaled, "liger_kernel"),
    "cut-cross-entropy": (peers.cut_cross_entropy, "cut_cross_entropy"),
    "torch-linear": (peers.torch_linear, "torch"),
}
PEERS = {**LOGITS_PEERS, **HEAD_PEERS}
# What a package that is there may say of a machine that it does not serve.
OPTIONAL_FAILURES = (ImportError, AttributeError, NotImplementedError, RuntimeError, TypeError)
CPU_HEADS = ("linear-head-forward", "linear-head-recompute")
GPU_HEADS = ("linear-head-keep", "linear-head-keep-1024", "linear-head-main-grad")
ONE_RANK = {"full-log-softmax", "linear-head-forward", "liger", *HEAD_PEERS}


def available(source: str, cuda: bool) -> list[str]:
    """Names of the methods that run here, the floor and the baseline first."""
    names = [name for name in LOGITS if not (cuda and name in ("full-log-softmax",))]
    if cuda:
        names.remove("chunked-log-prob")
        table = {**LOGITS_PEERS, **(HEAD_PEERS if source == "hidden" else {})}
        names += [n for n, (_, module) in table.items() if importlib.util.find_spec(module)]
    if source == "hidden":
        names += GPU_HEADS if cuda else CPU_HEADS
    return names


def method(name: str, source: str, chunk_size: int, leaves: list[Tensor]) -> Loss:
    """The loss of that name: of (hidden, weight, …) or (logits, …) and (labels, mask, group)."""
    if name == "chunked-log-prob":
        loss: Loss = functools.partial(chunked_log_prob, chunk_size=chunk_size)
        return _through(loss) if source == "hidden" else loss
    if name in LOGITS or name in LOGITS_PEERS:
        loss = LOGITS[name] if name in LOGITS else LOGITS_PEERS[name][0]
        return _through(loss) if source == "hidden" else loss
    if name in HEAD_PEERS:
        return HEAD_PEERS[name][0]
    if name == "linear-head-main-grad":
        leaves[1].main_grad = torch.zeros_like(leaves[1], dtype=torch.float32)
        return _head("keep", None, 2304 * MIB, fuse=True)
    if name == "linear-head-keep":  # room for all rows of the largest shape
        return _head("keep", None, 2304 * MIB)
    if name == "linear-head-keep-1024":
        return _head("keep", None, 1024 * MIB)
    return _head(name.removeprefix("linear-head-"), chunk_size, None)
