"""Losses of other packages, as tools/benchmark_loss.py calls them; each is imported when called.

Each maps (hidden [T, h], weight [V, h] or logits [T, V], labels [T], mask [T], group) to the scalar
Σ p·CE / number of supervised tokens, as the package's users would get it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_dft(cross_entropy: Tensor, mask: Tensor) -> Tensor:
    """The DFT weight put on a per-token cross entropy."""
    weight = torch.exp(-cross_entropy.detach())
    return (weight * cross_entropy * mask).sum() / mask.sum().clamp(min=1)


def _target(labels: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), labels, -100)


def transformer_engine(logits, labels, mask, group) -> Tensor:
    """TE's Triton cross entropy, the weight on top."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    losses = parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1), 0.0, False, group)
    return mean_dft(losses.squeeze(1), mask)


def liger(logits, labels, mask, group) -> Tensor:
    """Liger's Triton cross entropy, one rank only, the weight on top."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return mean_dft(liger_cross_entropy(logits, labels, reduction="none"), mask)


def liger_flce(hidden, weight, labels, mask, group) -> Tensor:
    """Liger's fused linear cross entropy, whose token scaling is DFT; gradients in the forward."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, _target(labels, mask), None, None, -100, 0.0, 0.0, "mean", None, False,
        torch.float32, True,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def liger_scaled(hidden, weight, labels, mask, group) -> Tensor:
    """Liger's fused linear scaled cross entropy (its CuTe kernels where the extra is installed)."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, _target(labels, mask))
    return mean_dft(out[0] if isinstance(out, tuple) else out, mask)


def cut_cross_entropy(hidden, weight, labels, mask, group) -> Tensor:
    """apple's cut cross entropy: no logits in memory at all."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight, _target(labels, mask), reduction="none")
    return mean_dft(losses, mask)


def torch_linear(hidden, weight, labels, mask, group) -> Tensor:
    """torch's own linear cross entropy (2.14)."""
    losses = F.linear_cross_entropy(
        hidden, weight, _target(labels, mask), reduction="none", ignore_index=-100
    )
    return mean_dft(losses.float(), mask)


class _Products(torch.autograd.Function):
    """The three products of the supervised rows, and nothing between them."""

    @staticmethod
    def forward(ctx, hidden, weight, mask):
        index = mask.nonzero().squeeze(1)
        everything = len(index) == len(hidden)
        rows = hidden if everything else hidden[index]
        logits = torch.mm(rows, weight.t())
        d_hidden = torch.mm(logits, weight)
        ctx.d_weight = torch.mm(logits.t(), rows)
        ctx.d_hidden = d_hidden
        if not everything:
            ctx.d_hidden = torch.zeros_like(hidden).index_copy_(0, index, d_hidden)
        return d_hidden[:1, 0].float().sum()

    @staticmethod
    def backward(ctx, *grads):
        return ctx.d_hidden, ctx.d_weight, None


def three_products(hidden, weight, labels, mask, group) -> Tensor:
    """The floor of every head that has logits."""
    return _Products.apply(hidden, weight, mask)
