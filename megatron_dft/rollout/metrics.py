"""pass@1, Avg@k and maj@k of a set of prompts, with intervals.

    pass@1   share of prompts whose first sample is right
    Avg@k    mean over prompts of the share of right samples
    maj@k    share of prompts whose most frequent answer is right

pass@1 and maj@k are shares of prompts: Wilson's score interval (1927). Avg@k is a mean over
prompts: percentiles of the mean over prompts drawn with replacement (Efron's bootstrap), which
takes the samples of one prompt as they are, together. Where all samples are right, or none,
resampling shows no spread; then Wilson's interval of that many prompts stands in its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

LEVEL = 0.95
_Z = 1.959963984540054  # the normal quantile of (1 + LEVEL) / 2
_RESAMPLES = 10_000
_AT_ONCE = 500  # resamples in memory


@dataclass(frozen=True)
class Scored:
    """One prompt's samples in order: was each right, and the answer that it votes for, if any."""

    right: Sequence[bool]
    answers: Sequence[str | None]


@dataclass(frozen=True)
class Estimate:
    """A share in 0 … 1 with its 95 % interval; resampled: float64 [resamples], means of Avg@k."""

    value: float
    low: float
    high: float
    resampled: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def record(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def pass_at_1(prompts: Sequence[Scored]) -> Estimate:
    return wilson(sum(p.right[0] for p in prompts), len(prompts))


def average_at_k(prompts: Sequence[Scored], seed: int = 0) -> Estimate:
    found = bootstrap(np.array([np.mean(p.right) for p in prompts]), seed)
    if found.value not in (0, 1):
        return found
    bounds = wilson(int(found.value) * len(prompts), len(prompts))
    return replace(found, low=bounds.low, high=bounds.high)


def majority_at_k(prompts: Sequence[Scored]) -> Estimate:
    return wilson(sum(map(majority_is_right, prompts)), len(prompts))


def majority_is_right(prompt: Scored) -> bool:
    """Samples without an answer have no vote; of equally frequent answers the first drawn wins.

    A verifier that names no answers cannot be asked: then the majority of right and wrong counts.
    """
    votes = Counter(a for a in prompt.answers if a is not None)
    if not votes:
        return 2 * sum(prompt.right) > len(prompt.right)
    winner = votes.most_common(1)[0][0]  # Counter keeps the order of first appearance
    return next(r for r, a in zip(prompt.right, prompt.answers, strict=True) if a == winner)


def wilson(right: int, count: int) -> Estimate:
    """Wilson's score interval of a share of `count` independent trials."""
    share, square = right / count, _Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = _Z * spread / (1 + square / count)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of `values` [prompts] over resampled prompts.

    Alike for every model of one set: the same prompts are drawn, so that differences are paired.
    """
    draws, n = np.random.default_rng(seed), len(values)
    means = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        # The counts of each prompt in a resample are all that its mean needs.
        counts = draws.multinomial(n, np.full(n, 1 / n), _AT_ONCE)
        means.append(counts @ values / n)
    return estimate(float(values.mean()), np.concatenate(means))


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), resampled)


def mean_of(sets: Sequence[Estimate]) -> Estimate:
    """The plain mean over sets, each resampled by itself."""
    value = sum(e.value for e in sets) / len(sets)
    found = estimate(value, np.mean([e.resampled for e in sets], axis=0))
    if found.high > found.low or value not in (0, 1):
        return found
    low, high = sum(e.low for e in sets), sum(e.high for e in sets)
    return replace(found, low=low / len(sets), high=high / len(sets))


def difference(after: Estimate, before: Estimate) -> Estimate:
    """after − before over the same resampled prompts."""
    return estimate(after.value - before.value, after.resampled - before.resampled)
