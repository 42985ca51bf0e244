"""What a verifier says of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A sample to verify: the prompt's messages, the model's text, the reference answer."""

    messages: list[dict[str, Any]]
    text: str
    answer: Any


@dataclass(frozen=True)
class Verdict:
    """reward: None where the verifier could not tell; answer: what votes in maj@k, in one form for
    equal answers; kind: what was unusual, to be counted.
    """

    reward: float | None
    answer: str | None = None
    kind: str | None = None


Check = Callable[[Task], Verdict]


def from_value(value: Any) -> Verdict:
    """What a user's function returned: a bool or a finite number."""
    if isinstance(value, bool | int | float):
        reward = float(value)
        if math.isfinite(reward):
            return Verdict(reward)
        return Verdict(None, kind=f"reward that is {reward}")
    try:
        return from_value(value.item())  # a number of numpy or torch
    except (AttributeError, ValueError, RuntimeError, RecursionError):
        return Verdict(None, kind=f"reward that is no number but {type(value).__name__}")
