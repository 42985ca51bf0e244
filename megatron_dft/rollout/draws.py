"""One answer of a model: what is asked for, what came, and what stops or fails a backend."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_dft.rollout.prompts import Prompt


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. temperature 0 is greedy; max_tokens: [tokens] of an answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1
    stop: tuple[str, ...] = ()

    def check(self, samples: int) -> None:
        """Raises ValueError for a setting that has no meaning."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p: expected above 0 and at most 1, got {self.top_p}")
        for flag, value in (("--max-tokens", self.max_tokens), ("--samples", samples)):
            if value < 1:
                raise ValueError(f"{flag}: expected 1 or more, got {value}")
        if self.temperature == 0 and samples > 1:
            raise ValueError(
                f"--samples {samples} with --temperature 0: all would be alike; draw one, or give "
                "a temperature"
            )


@dataclass(frozen=True)
class Draw:
    """Sample number `sample` of a prompt, from 0, with its own seed."""

    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt.number, self.sample


@dataclass(frozen=True)
class Answer:
    """text without special tokens; tokens: how many were drawn; finish: "stop", or "length"."""

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Fault:
    """No answer came; `kind` is what is counted."""

    kind: str


Result = tuple[Draw, Answer | Fault]


class BackendGone(ValueError):
    """The backend answers no more; what it gave before is stored."""


class Backend(Protocol):
    """Draws answers. `whole_batches`: an answer may depend, by rounding, on its batch's others."""

    name: str
    whole_batches: bool
    batch_size: int

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share, beside the flags."""

    def length(self, prompt: Prompt) -> int:
        """[tokens] of the prompt; 0 where only the server can tell."""

    def room(self) -> int | None:
        """[tokens] of a prompt with its answer; None where only the server can tell."""

    def generate(self, draws: Sequence[Draw]) -> Iterator[list[Result]]:
        """Every draw once, in lists as they come. Raises BackendGone where none will come."""


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """A number below 2³¹ that depends on these three alone: not on batching, order or resuming."""
    digest = hashlib.blake2b(f"{seed}:{prompt}:{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
