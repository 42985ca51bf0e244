"""What the self-test compares with: the gradient of an objective, dense, in float64, by autograd.

Shapes: b rows of s tokens, V the whole vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dft.losses.registry import Objective
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_parallel import TOP_K
from megatron_dft.step.batch import MicroBatch


def dense_gradient(
    logits_bsV: Tensor,
    batch: MicroBatch,
    upstream_bs: Tensor,
    objective: Objective,
    kl_coeff: float = 0.0,
    reference_bsV: Tensor | None = None,
    copies: int = 1,
) -> Tensor:
    """d Σ upstream · (loss + kl_coeff · KL) / d logits, float64 [b, s, V], every step of it dense.

    Args:
        batch: its labels, mask, packing and reference_log_prob are used.
        reference_bsV: a reference's logits, for the KL.
        copies: context-parallel ranks, each with this same batch: their tokens belong to the same
            conversations.
    """
    logits = logits_bsV.double().requires_grad_()
    log_probs = logits.log_softmax(-1)
    supervised = batch.loss_mask.bool()
    log_prob = log_probs.gather(-1, torch.where(supervised, batch.labels, 0)[..., None]).squeeze(-1)
    kl = None
    if reference_bsV is not None:
        share = objective.reference_share
        base = (1.0 - share) * logits.detach() + share * reference_bsV.double()
        base = base.log_softmax(-1)
        kl = (base.exp() * (base - log_probs)).sum(-1)
    stats = TokenStats(
        log_prob.detach(), supervised, kl=kl, **_conversations(batch), **_distribution(log_probs)
    )
    terms = objective.terms(stats)
    length = log_prob.shape[1]
    weight = objective.terms(_repeated(stats, copies)).weight[:, :length]
    loss = torch.where(supervised, -weight * log_prob, 0.0)
    if terms.extra is not None:
        loss = loss + terms.extra
    if kl_coeff:
        assert kl is not None
        loss = loss + kl_coeff * torch.where(supervised, kl, 0.0)
    (loss * upstream_bs.double()).sum().backward()
    assert logits.grad is not None
    return logits.grad


def _distribution(log_probs: Tensor) -> dict[str, Tensor]:
    """The statistics of the whole distribution that an objective may ask for."""
    log_probs = log_probs.detach()
    top = log_probs.topk(min(TOP_K, log_probs.shape[-1])).values
    top = top - top.logsumexp(-1, keepdim=True)
    return {
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "entropy_top20": -(top.exp() * top).sum(-1),
        "sum_sq_prob": log_probs.exp().square().sum(-1),
    }


def _conversations(batch: MicroBatch) -> dict[str, Any]:
    """What the batch knows, reduced over no ranks."""
    return batch.token_stats() | {"context_parallel_group": None}


def _repeated(stats: TokenStats, copies: int) -> TokenStats:
    """Every row so many times as long."""
    if copies == 1:
        return stats
    fields = {
        name: value.repeat(1, copies)
        for name, value in vars(stats).items()
        if isinstance(value, Tensor)
    }
    return replace(stats, **fields)
