"""What a training run reports of every micro-batch, in the form that Megatron sums up.

Megatron's loop takes name → [sum, count] and logs Σ sum / Σ count over micro-batches, data- and
context-parallel ranks (training/training.py, train_step and evaluate).
"""

import torch
from torch import Tensor

HISTOGRAM_BINS = 10
HISTOGRAM = "dft/p-histogram/"
TOKENS = "dft/supervised-tokens"
CROSS_ENTROPY = "lm loss"
END_PROB = "dft/end-prob"


def histogram_key(index: int) -> str:
    """The report's name for the share of tokens with p in [index/10, (index+1)/10)."""
    return f"{HISTOGRAM}{index}"


@torch.no_grad()
def loss_report(
    objective: str | None,
    cross_entropy: Tensor,
    token_loss: Tensor,
    weight: Tensor,
    mask: Tensor,
    correct: Tensor | None,
    kl: Tensor | None = None,
    ends: Tensor | None = None,
) -> dict[str, Tensor]:
    """name → fp32 [sum, count] of one micro-batch on one rank.

    Args:
        objective: its name, or None in evaluation (then only the plain figures are given).
        cross_entropy, token_loss, weight: fp32 [b, s]; garbage where `mask` is 0 is left out.
        mask: [b, s], 0 or 1.
        correct: bool [b, s], whether the target is the model's first choice; None if not known.
        kl: fp32 [b, s], KL(π_base ‖ π_θ); None without a reference.
        ends: bool [b, s], which supervised tokens end a turn; None if not known.
    """
    supervised = mask.bool()
    ce = torch.where(supervised, cross_entropy, 0.0)
    p = torch.where(supervised, (-ce).exp(), 0.0)
    count = supervised.sum().float()

    def entry(total: Tensor) -> Tensor:
        # A fresh tensor: the schedules scale the returned loss in place, an alias would follow it.
        return torch.stack([total.detach().float().clone(), count])

    report = {CROSS_ENTROPY: entry(ce.sum())}
    if objective is not None:
        if objective != "sft":
            report[f"{objective} loss"] = entry(token_loss.sum())
        report["dft/mean-weight"] = entry(weight.sum())
    report["dft/mean-prob"] = entry(p.sum())
    if ends is not None:
        ends = ends & supervised
        report[END_PROB] = torch.stack([torch.where(ends, p, 0.0).sum(), ends.sum().float()])
    if correct is not None:
        report["dft/token-accuracy"] = entry((correct & supervised).sum())
    if kl is not None:
        report["dft/kl"] = entry(torch.where(supervised, kl, 0.0).sum())
    if objective is not None:
        bins = (p * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
        shares = torch.zeros(HISTOGRAM_BINS, device=p.device)
        shares.index_add_(0, bins.flatten(), supervised.flatten().float())
        for index in range(HISTOGRAM_BINS):
            report[histogram_key(index)] = entry(shares[index])
        report[TOKENS] = torch.stack([count, torch.ones_like(count)])
    return report
