"""A directory of samples to rewarded samples, each beside its prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dft.rollout.prompts import Prompt, Skips
from megatron_dft.rollout.store import read_samples, read_settings, read_stored_prompts
from megatron_dft.rollout.verdict import Task, Verdict
from megatron_dft.rollout.verifiers import VerifyAll

_LINE_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Rewarded:
    """One sample with what the verifier said. finish: "stop", or "length" where it was cut."""

    prompt: Prompt
    sample: int
    text: str
    finish: str
    verdict: Verdict

    @property
    def reward(self) -> float | None:
        return self.verdict.reward

    def record(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt.number,
            "sample": self.sample,
            "reward": self.reward,
            "answer": self.verdict.answer,
            "kind": self.verdict.kind,
            "text": self.text,
            "finish": self.finish,
        }


def reward_samples(
    directory: Path, kind: str, verify_all: VerifyAll, label: str = "verify"
) -> list[Rewarded]:
    """Every sample of the directory, ordered by prompt and sample number.

    kind: the verifier's, `verify_all` what `verifying` gives. Raises ValueError where there is no
    sample, or where the verifier needs a reference answer and no prompt has one.
    """
    read_settings(directory)
    prompts = {p.number: p for p in read_stored_prompts(directory)}
    samples = read_samples(directory)
    if not samples:
        raise ValueError(f"{directory}: holds no sample yet")
    needs_answer = kind in ("math", "exact", "regex")
    if needs_answer and not any(_is_answer(p.answer) for p in prompts.values()):
        raise ValueError(
            f"--verifier {kind}: no prompt of {directory} has a reference answer; name its "
            "column when sampling, --columns answer=COLUMN"
        )
    told = _progress(label, len(samples))
    asked = [s for s in samples if not needs_answer or _is_answer(prompts[s["prompt"]].answer)]
    tasks = [
        Task(prompts[s["prompt"]].messages, s["text"], prompts[s["prompt"]].answer) for s in asked
    ]
    keys = [(s["prompt"], s["sample"]) for s in asked]
    verdicts = dict(zip(keys, verify_all(tasks, told), strict=True))
    without = Verdict(None, kind="prompt without a reference answer")
    return [
        Rewarded(
            prompts[s["prompt"]],
            s["sample"],
            s["text"],
            s["finish"],
            verdicts.get((s["prompt"], s["sample"]), without),
        )
        for s in samples
    ]


def _is_answer(reference: Any) -> bool:
    """An empty reference would make an empty answer right."""
    return reference is not None and bool(str(reference).strip())


def unusual(rewarded: Iterable[Rewarded]) -> Skips:
    """What the verifier met that was not simply right or wrong, by kind."""
    found = Skips()
    for one in rewarded:
        if one.verdict.kind is not None:
            found.add(one.verdict.kind, f"{one.prompt.where}, sample {one.sample}")
    return found


def _progress(label: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_SECONDS:
            last = time.monotonic()
            print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return tell
