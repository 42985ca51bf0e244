"""What a tuned model still says as its base does, on held-out text and on the new task."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_dft.drift.scoring import CHUNK, Batch, Sequences, batches, logits_of, targets_of


@dataclass
class _Sums:
    """Sums over tokens in float64, and each text's own KL and tokens for the standard error."""

    base_nll: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    agree: int = 0
    texts: list[tuple[float, int]] = field(default_factory=list)

    def add(self, batch: Batch, left: torch.Tensor, right: torch.Tensor) -> None:
        """One batch's logits [K, V] under the base and under the tuned model."""
        target = torch.from_numpy(targets_of(batch)).to(left.device)[:, None]
        kl_K = []
        for s in range(0, len(target), CHUNK):
            log_b = torch.log_softmax(left[s : s + CHUNK], dim=-1)
            log_t = torch.log_softmax(right[s : s + CHUNK], dim=-1)
            here = target[s : s + CHUNK]
            self.base_nll -= float(log_b.gather(1, here).double().sum())
            self.nll -= float(log_t.gather(1, here).double().sum())
            kl_K.append(_kl(log_b, log_t))
            self.reverse_kl += float(_kl(log_t, log_b).sum())
            self.agree += int((log_b.argmax(-1) == log_t.argmax(-1)).sum())
        each = torch.cat(kl_K)
        self.kl += float(each.sum())
        lengths = [int(mask.sum()) for _, mask in batch]
        self.texts += [(float(x.sum()), len(x)) for x in each.split(lengths)]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """float64 [K]: KL(p ‖ q) of rows of log-probabilities [K, V]."""
    # exp(-inf) · (-inf - …) is NaN where p rules a token out; it adds nothing.
    gap = torch.where(torch.isneginf(log_p), 0.0, log_p - log_q)
    return (log_p.exp() * gap).double().sum(-1)


def _standard_error(texts: list[tuple[float, int]], mean: float) -> float | None:
    """Of a mean over tokens whose texts are the independent draws (a ratio estimate)."""
    count, tokens = len(texts), sum(n for _, n in texts)
    if count < 2:
        return None
    spread = sum((total - mean * n) ** 2 for total, n in texts)
    return math.sqrt(spread * count / (count - 1)) / tokens


@torch.no_grad()
def measure(
    base: Any,
    tuned: Any,
    sequences: Sequences,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float | int | None]:
    """Means over the masked tokens of all `sequences` (see `scoring.windows`), in float64 sums.

    Returns tokens, base_perplexity and perplexity (exp of the mean negative log probability), kl
    (mean KL(base ‖ tuned) over the vocabulary, nats a token), kl_error (its standard error over the
    sequences, None for one), reverse_kl (KL(tuned ‖ base)), kl_sequence (mean over the sequences of
    the KL summed over a sequence's tokens) and top1_agreement (share of positions where both have
    the same most likely token). Raises ValueError without any token, or where the two models'
    vocabularies differ.

    On the new task's prompts with answers sampled from the base, kl_sequence is an unbiased
    estimate of E_x KL(π₀(·|x) ‖ π(·|x)), which arXiv 2509.04259 found to predict forgetting.
    """
    sums = _Sums()
    for batch in batches(sequences):
        left, right = logits_of(base, batch), logits_of(tuned, batch)
        if left.shape != right.shape:
            raise ValueError(
                f"the models' vocabularies have {left.shape[1]} and {right.shape[1]} entries; "
                "retention compares versions of one model"
            )
        sums.add(batch, left, right)
        progress(len(left))
    tokens = sum(n for _, n in sums.texts)
    if not tokens:
        raise ValueError("the text holds no token to score; give longer texts")
    # Rounding can leave equal models at -1e-9.
    kl = max(sums.kl / tokens, 0.0)
    return {
        "tokens": tokens,
        "base_perplexity": math.exp(sums.base_nll / tokens),
        "perplexity": math.exp(sums.nll / tokens),
        "kl": kl,
        "kl_error": _standard_error(sums.texts, sums.kl / tokens),
        "reverse_kl": max(sums.reverse_kl / tokens, 0.0),
        "kl_sequence": max(sums.kl / len(sums.texts), 0.0),
        "top1_agreement": sums.agree / tokens,
    }
