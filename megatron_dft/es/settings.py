"""What a run of evolution strategies is set to, with the paper's values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """σ, α and N as in arXiv 2509.24372, section 4.1; anchor_decay is λ of arXiv 2605.30148."""

    population: int = 30
    sigma: float = 1e-3
    alpha: float = 5e-4
    anchor_decay: float = 0.0
    seed: int = 1

    def check(self) -> None:
        """Raises ValueError for a setting that has no meaning."""
        if self.population < 2:
            raise ValueError(
                f"--population: expected 2 or more, got {self.population}; rewards are compared "
                "with each other"
            )
        for flag, value in (("--sigma", self.sigma), ("--alpha", self.alpha)):
            if not 0 < value < math.inf:
                raise ValueError(f"{flag}: expected a number above 0, got {value}")
        if not 0 <= self.alpha * self.anchor_decay < 1:
            raise ValueError(
                f"--anchor-decay {self.anchor_decay}: expected from 0 to below 1 / alpha "
                f"({1 / self.alpha:g}), where nothing of the update would be left"
            )


def z_scores(rewards: Sequence[float]) -> list[float]:
    """Rewards of one iteration with mean 0 and standard deviation 1 (over the population, not a
    sample of it); all 0 where they are all alike, which says nothing about where to go.
    """
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    # Equal rewards may have a mean a rounding away from them.
    if deviation <= 1e-12 * max(map(abs, rewards)):
        return [0.0] * len(rewards)
    return [(r - mean) / deviation for r in rewards]
