"""The family of token objectives: pure functions from token statistics to a weight on −log p.

Symbols: p = π_θ(y_t | y_<t, x) of the target token, CE = −log p, w = the detached weight, so that
the gradient of a token's loss with respect to the logits z is w · (softmax(z) − onehot(y)).

An objective gets a `TokenStats` whose `log_prob` is detached, at most 0 but for rounding at
supervised tokens and 0 elsewhere (`weighting.Objective` sees to it), and returns `Terms`. To add
one: write the function here and its line in registry.py.
"""

import torch
from torch import Tensor

from megatron_dft.losses.token_stats import (
    Terms,
    TokenStats,
    batch_median,
    log_ratio,
    segment_count,
    segment_mean,
    segment_sum,
)


def sft(stats: TokenStats) -> Terms:
    """Plain cross entropy: w = 1."""
    return Terms(torch.ones_like(stats.log_prob))


def dft(stats: TokenStats) -> Terms:
    """w = p (arXiv 2508.05629). Its gradient is that of −p, not of −log p."""
    return Terms(stats.prob)


def dft_sequence(stats: TokenStats) -> Terms:
    """w = Π p over the conversation (2508.05629, table 5): underflows on all but short ones."""
    return Terms(segment_sum(stats, stats.log_prob).clamp(max=0.0).exp())


def dft_geometric(stats: TokenStats) -> Terms:
    """w = (Π p)^(1/n), n supervised tokens of the conversation (2508.05629, table 5)."""
    return Terms(segment_mean(stats, stats.log_prob).clamp(max=0.0).exp())


def dft_mix(stats: TokenStats, alpha: float) -> Terms:
    """w = α·p + (1 − α): between cross entropy (α = 0) and DFT (α = 1)."""
    return Terms(alpha * stats.prob + (1.0 - alpha))


def dft_floor(stats: TokenStats, floor: float) -> Terms:
    """w = max(p, floor): tokens the model does not know keep some gradient."""
    return Terms(stats.prob.clamp(min=floor))


def p_alpha(stats: TokenStats, alpha: float) -> Terms:
    """loss = (1 − p^α)/α, hence w = p^α (2510.00526).

    α → 0 is cross entropy; α = 1 has DFT's gradient.
    """
    return Terms(stats.prob**alpha, _deformed_nll(stats.log_prob, alpha))


def _deformed_nll(log_prob: Tensor, alpha: Tensor | float) -> Tensor:
    """(1 − p^α)/α, without cancellation for small α, and −log p at α = 0."""
    if not isinstance(alpha, Tensor):
        alpha = log_prob.new_full((), alpha)  # made on the device: nothing waits for a copy
    # (1 − e^x)/α with x = α·log p; at α = 0 with log p = −inf, x would be NaN.
    return torch.where(alpha == 0, -log_prob, -torch.expm1(alpha * log_prob) / alpha)


def nll_threshold(stats: TokenStats, threshold: float) -> Terms:
    """w = 1 if p ≥ threshold else 0 (2510.00526; ProFit 2601.09195)."""
    return Terms((stats.prob >= threshold).to(stats.log_prob.dtype))


def dcr(stats: TokenStats, tau: float) -> Terms:
    """w = p if p < τ else 1 (dynamic coefficient rectification, 2604.14258)."""
    p = stats.prob
    return Terms(torch.where(p < tau, p, 1.0))


def talr(stats: TokenStats, floor: float, tau: float) -> Terms:
    """w = max(p^(1/τ), floor), τ = median cross entropy of the tokens unless given (2509.20758).

    The median is that of one micro-batch, over its context-parallel parts: it does not depend on
    the tensor, pipeline or context layout, but it does on the micro-batch size. `batch_group`
    widens it to the micro-batches that the data-parallel ranks run at that moment.
    """
    temperature: Tensor | float = tau
    if tau == 0.0:
        tiny = torch.finfo(stats.log_prob.dtype).tiny
        temperature = batch_median(stats, -stats.log_prob).clamp(min=tiny)
    return Terms((stats.log_prob.clamp(max=0.0) / temperature).exp().clamp(min=floor))


def chord_phi(stats: TokenStats) -> Terms:
    """w = p(1 − p): only tokens that the model is unsure of (2508.11408)."""
    p = stats.prob
    return Terms(p * (1.0 - p))


def iw_sft(stats: TokenStats, level: str, low: float, high: float, temperature: float) -> Terms:
    """Importance-weighted SFT against a reference policy (2507.12856).

    Token level: w = clamp(p / p_ref, low, high). Sequence level: w = clamp(exp(temperature · m),
    low, high), m the conversation's mean of log p − log p_ref.
    """
    ratio = log_ratio(stats)
    if level == "sequence":
        ratio = temperature * segment_mean(stats, ratio)
    return Terms(ratio.exp().clamp(min=low, max=high))


def psft(stats: TokenStats, clip: float) -> Terms:
    """loss = −min(r, 1 + ε), r = p / p_old; w = r up to the clip, 0 beyond (2508.17784).

    The paper's −min(r·A, clip(r, 1 − ε₁, 1 + ε₂)·A) with its advantage A = 1: the lower clip ε₁ can
    never be the minimum then, so only ε₂ exists here.
    """
    ratio = log_ratio(stats).exp()
    inside = ratio <= 1.0 + clip
    return Terms(torch.where(inside, ratio, 0.0), -ratio.clamp(max=1.0 + clip))


def asft(stats: TokenStats, kl_weight: float) -> Terms:
    """DFT + λ · KL(π_base ‖ π_θ) over the full vocabulary (2509.23753)."""
    assert stats.kl is not None
    return Terms(stats.prob, extra=kl_weight * stats.kl)


def target_sft(stats: TokenStats, eta: float) -> Terms:
    """Cross entropy to Q = p·δ_y + (1 − p)·π̃, π̃ ∝ π_θ^(1−η)·π_T^η (Target-SFT, 2606.11189).

    Q is a constant: the gradient by the logits is softmax − Q. `kl` is KL(π̃ ‖ π_θ), whose gradient
    is that of the cross entropy to π̃; so the loss reads lower than the paper's by (1 − p)·H(π̃).
    Tokens of `full_weight` are trusted wholly: Q = δ_y.
    """
    assert stats.kl is not None
    trust = stats.prob
    if stats.full_weight is not None:
        trust = torch.where(stats.full_weight.to(torch.bool), 1.0, trust)
    return Terms(trust, extra=(1.0 - trust) * stats.kl)


def idft(stats: TokenStats, beta: float, low: float, high: float) -> Terms:
    """w = p^γ, γ = clamp(exp(−φ/β), low, high), φ = log p + H (IDFT, 2602.12222).

    φ < 0: the token is less likely than the model's own would be on average, γ > 1 keeps less of
    its gradient than DFT; φ > 0: γ < 1 keeps more.
    """
    assert stats.entropy is not None
    gamma = (-(stats.log_prob + stats.entropy) / beta).exp().clamp(min=low, max=high)
    return Terms((gamma * stats.log_prob.clamp(max=0.0)).exp())


def rift(stats: TokenStats, level: str) -> Terms:
    """loss = −r·log p where the row's reward r > 0, −r·p where r < 0 (RIFT, 2601.09253).

    −r·p lies in [0, −r], where −r·log p would run to −∞ as p falls; its w is r·p, below 0. p is the
    token's, or at the sequence level Π p over the answer: the paper's π(y | x), which is 0 in fp32
    for all but short ones.
    """
    assert stats.reward is not None
    reward, p, share = stats.reward, stats.prob, torch.ones_like(stats.log_prob)
    if level == "sequence":
        p = segment_sum(stats, stats.log_prob).clamp(max=0.0).exp()
        share = 1.0 / segment_count(stats).clamp(min=1.0)
    likelihood = torch.where(reward == 0, 0.0, -reward * stats.log_prob)
    value = torch.where(reward < 0, -reward * p * share, likelihood)
    return Terms(torch.where(reward < 0, reward * p, reward), value)


def eaft(stats: TokenStats, exponent: float) -> Terms:
    """w = (H_top20 / 3)^exponent (2601.02151): a target that the model is sure is wrong fades.

    H_top20 ≤ log 20 ≈ 3 nats.
    """
    assert stats.entropy_top20 is not None
    return Terms((stats.entropy_top20.detach().clamp(min=0.0) / 3.0) ** exponent)


def deft(stats: TokenStats) -> Terms:
    """loss = (1 − p^α)/α with the constant α = Σ_k p_k², hence w = p^α (2602.11424)."""
    assert stats.sum_sq_prob is not None
    alpha = stats.sum_sq_prob.detach()
    return Terms(stats.prob**alpha, _deformed_nll(stats.log_prob, alpha))
