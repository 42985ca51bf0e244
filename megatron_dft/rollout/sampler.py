"""Draws what is missing of n samples a prompt, batch by batch, and stores each batch at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dft.rollout.draws import (
    Answer,
    Backend,
    Decoding,
    Draw,
    Result,
    sample_seed,
)
from megatron_dft.rollout.prompts import Prompt, Skips, fingerprint
from megatron_dft.rollout.store import SampleStore

_LINE_EVERY_SECONDS = 10.0


@dataclass
class Outcome:
    """samples: drawn now; kept: stored before; tokens: drawn now; faults: what gave no sample."""

    samples: int = 0
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0
    missing: int = 0
    skips: Skips = field(default_factory=Skips)
    faults: Skips = field(default_factory=Skips)

    def line(self) -> str:
        if self.kept and not self.samples:
            return f"none drawn, {self.kept:,} were there before"
        speed = self.tokens / self.seconds if self.seconds > 0 else 0.0
        text = f"{self.samples:,} samples, {self.tokens:,} tokens, {speed:,.0f} tokens/s"
        return text + (f"; {self.kept:,} were there before" if self.kept else "")


def draw_samples(
    directory: Path,
    prompts: Sequence[Prompt],
    samples: int,
    decoding: Decoding,
    backend: Backend,
    *,
    settings: dict[str, Any] | None = None,
    part: tuple[int, int] = (0, 1),
    label: str = "sample",
) -> Outcome:
    """Fill `directory` until it holds `samples` answers to each prompt of this part.

    settings: what else the samples depend on. A prompt that leaves no room for `max_tokens` is
    skipped and counted. Raises ValueError where the directory holds other samples, BackendGone
    where the backend stops answering: everything drawn until then is stored.
    """
    decoding.check(samples)
    identity = {
        **backend.identity(),
        "prompts": fingerprint(prompts),
        "samples": samples,
        **asdict(decoding),
        "stop": list(decoding.stop),
        **(settings or {}),
    }
    store = SampleStore(directory, *part)
    outcome = Outcome()
    mine = [p for p in prompts if p.number % part[1] == part[0]]
    batches = list(_batches(_draws(mine, samples, decoding, backend, outcome.skips), backend))
    store.open(identity, prompts)
    begin = time.monotonic()
    try:
        done = store.done()
        planned = {draw.key for batch in batches for draw in batch}
        outcome.kept = len(planned & done)
        tell = _progress(label, len(planned) - outcome.kept, outcome)
        _fill(batches, backend, store, done, outcome, tell)
    finally:
        store.close()
        outcome.seconds = time.monotonic() - begin
        outcome.missing = len(planned - done)
    return outcome


def _draws(
    prompts: Sequence[Prompt], samples: int, decoding: Decoding, backend: Backend, skips: Skips
) -> Iterator[Draw]:
    """Draws of the prompts that fit, the longest prompt first, so that lack of memory shows."""
    room, lengths = backend.room(), {p.number: backend.length(p) for p in prompts}
    for prompt in sorted(prompts, key=lambda p: (-lengths[p.number], p.number)):
        if room is not None and lengths[prompt.number] + decoding.max_tokens > room:
            kind = f"prompt that leaves no room for --max-tokens {decoding.max_tokens} in {room}"
            skips.add(kind, prompt.where)
            continue
        for sample in range(samples):
            yield Draw(prompt, sample, sample_seed(decoding.seed, prompt.number, sample))


def _batches(draws: Iterator[Draw], backend: Backend) -> Iterator[list[Draw]]:
    """The same batches whatever is done already: a resumed batch gives the same bits."""
    batch: list[Draw] = []
    for draw in draws:
        batch.append(draw)
        if len(batch) == backend.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _fill(
    batches: Sequence[list[Draw]],
    backend: Backend,
    store: SampleStore,
    done: set[tuple[int, int]],
    outcome: Outcome,
    tell: Callable[[], None],
) -> None:
    for batch in batches:
        missing = [draw for draw in batch if draw.key not in done]
        if not missing:
            continue
        for results in backend.generate(batch if backend.whole_batches else missing):
            new = [r for r in results if r[0].key not in done]
            good = [_record(draw, answer) for draw, answer in new if isinstance(answer, Answer)]
            store.append(good)
            done.update((r["prompt"], r["sample"]) for r in good)
            _count(new, outcome)
            tell()


def _record(draw: Draw, answer: Answer) -> dict[str, Any]:
    return {
        "prompt": draw.prompt.number,
        "sample": draw.sample,
        "seed": draw.seed,
        **asdict(answer),
    }


def _count(results: Sequence[Result], outcome: Outcome) -> None:
    for draw, answer in results:
        if isinstance(answer, Answer):
            outcome.samples += 1
            outcome.tokens += answer.tokens
        else:
            outcome.faults.add(answer.kind, draw.prompt.where)


def _progress(label: str, total: int, outcome: Outcome) -> Callable[[], None]:
    begin = last = time.monotonic()

    def tell() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_EVERY_SECONDS:
            return
        last, seconds = now, now - begin
        left = seconds / max(outcome.samples, 1) * (total - outcome.samples)
        print(
            f"{label}: {outcome.samples:,} of {total:,} samples, "
            f"{outcome.tokens / seconds:,.0f} tokens/s, {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    return tell
