"""What a tuned model still says as its base does, on held-out text."""

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_dft.drift.scoring import CHUNK, Sequences, batches, logits_of, targets_of


@torch.no_grad()
def measure(
    base: Any,
    tuned: Any,
    sequences: Sequences,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float | int]:
    """Means over the masked tokens of all `sequences` (see `scoring.windows`), in float64 sums.

    Returns tokens, base_perplexity and perplexity (exp of the mean negative log probability), kl
    (mean KL(base ‖ tuned) over the vocabulary, nats) and top1_agreement (share of positions where
    both have the same most likely token). Raises ValueError without any token, or where the two
    models' vocabularies differ.
    """
    tokens = agree = 0
    base_nll = nll = kl = 0.0
    for batch in batches(sequences):
        left, right = logits_of(base, batch), logits_of(tuned, batch)
        if left.shape != right.shape:
            raise ValueError(
                f"the models' vocabularies have {left.shape[1]} and {right.shape[1]} entries; "
                "retention compares versions of one model"
            )
        target = torch.from_numpy(targets_of(batch)).to(left.device)[:, None]
        for s in range(0, len(target), CHUNK):
            log_b = torch.log_softmax(left[s : s + CHUNK], dim=-1)
            log_t = torch.log_softmax(right[s : s + CHUNK], dim=-1)
            here = target[s : s + CHUNK]
            base_nll -= float(log_b.gather(1, here).double().sum())
            nll -= float(log_t.gather(1, here).double().sum())
            # exp(-inf) · (-inf - …) is NaN where the base rules a token out; it adds nothing.
            gap = torch.where(torch.isneginf(log_b), 0.0, log_b - log_t)
            kl += float((log_b.exp() * gap).sum(-1).double().sum())
            agree += int((log_b.argmax(-1) == log_t.argmax(-1)).sum())
        tokens += len(target)
        progress(len(target))
    if not tokens:
        raise ValueError("the text holds no token to score; give longer texts")
    return {
        "tokens": tokens,
        "base_perplexity": math.exp(base_nll / tokens),
        "perplexity": math.exp(nll / tokens),
        # Rounding can leave equal models at -1e-9.
        "kl": max(kl / tokens, 0.0),
        "top1_agreement": agree / tokens,
    }
