"""Pairs of a preferred and a rejected answer: conversations 2j and 2j + 1 of a micro-batch.

Shapes: P pairs, S conversations. An answer's log-probability is a sum over its tokens, which may
lie on several context-parallel ranks: one all-reduce of [3, S], and every rank knows every pair.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from megatron_dft.losses.token_stats import Terms, TokenStats, log_ratio, segment_table


class Pairs(NamedTuple):
    """What the answers of each pair come to, float64 [P, 2], chosen before rejected.

    log_prob: Σ log π; ratio: Σ (log π − log π_ref); tokens: how many are supervised; present: bool
    [P], whether both answers have any; segments: int64 [T], the conversation of each token.
    """

    log_prob: Tensor
    ratio: Tensor
    tokens: Tensor
    present: Tensor
    segments: Tensor


def pairs_of(stats: TokenStats) -> Pairs:
    """The pairs of these tokens; the same on all context-parallel ranks."""
    table, segments = segment_table(stats, stats.log_prob, log_ratio(stats))
    table = pad(table, (0, table.shape[1] % 2)).view(3, -1, 2)
    log_prob, ratio, tokens = table.unbind(0)
    return Pairs(log_prob, ratio, tokens, (tokens > 0).all(-1), segments)


def _sigmoid_loss(scores: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss, −∂loss/∂(score of chosen)) [P] of scores [P, 2]."""
    margin = beta * (scores[:, 0] - scores[:, 1])
    loss = -(1.0 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    slope = (1.0 - smoothing) * torch.sigmoid(-margin) - smoothing * torch.sigmoid(margin)
    return loss, beta * slope


def dpo(stats: TokenStats, beta: float, label_smoothing: float, log_probs: str) -> Terms:
    """−(1 − ε)·log σ(h) − ε·log σ(−h) a pair, h = β·(Δ_chosen − Δ_rejected) (DPO, 2305.18290).

    Δ: the answer's sum of log π − log π_ref, or with log_probs "mean" its mean over tokens
    (length-normalised). A token's value is its share of its pair's loss, so that the sum over
    tokens is the sum over pairs: divide by their number, not by that of the tokens.
    """
    pairs = pairs_of(stats)
    scale = pairs.tokens.clamp(min=1.0) if log_probs == "mean" else torch.ones_like(pairs.tokens)
    loss, slope = _sigmoid_loss(pairs.ratio / scale, beta, label_smoothing)
    # Not from a list: a copy of host memory would wait for the GPU.
    sign = 1.0 - 2.0 * torch.arange(2, dtype=slope.dtype, device=slope.device)
    weight = torch.where(pairs.present[:, None], slope[:, None] * sign / scale, 0.0)
    share = torch.where(pairs.present, loss / pairs.tokens.sum(-1).clamp(min=1.0), 0.0)
    share = share[:, None].expand_as(weight)

    def at_tokens(of_answers: Tensor) -> Tensor:
        found = of_answers.reshape(-1)[pairs.segments]
        return found.to(stats.log_prob.dtype).view_as(stats.log_prob)

    return Terms(at_tokens(weight), at_tokens(share))


@torch.no_grad()
def pair_figures(stats: TokenStats, beta: float, **objective) -> tuple[dict[str, Tensor], Tensor]:
    """(name → sum over the pairs, fp32 scalar; their number), by the names of TRL's DPOTrainer.

    `objective`: the other parameters of `dpo`. Rewards are β times an answer's summed log ratio.
    """
    clean = stats.supervised_only()
    pairs = pairs_of(clean)
    rewards = beta * pairs.ratio
    margins = rewards[:, 0] - rewards[:, 1]
    scale = pairs.tokens.clamp(min=1.0) if objective["log_probs"] == "mean" else 1.0
    loss, _ = _sigmoid_loss(pairs.ratio / scale, beta, objective["label_smoothing"])
    found = {
        "dpo loss": loss,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": (margins > 0).double(),
        "rewards/margins": margins,
        "logps/chosen": pairs.log_prob[:, 0],
        "logps/rejected": pairs.log_prob[:, 1],
    }
    sums = {n: torch.where(pairs.present, x, 0.0).sum().float() for n, x in found.items()}
    return sums, pairs.present.sum()
