"""Which rewarded samples train, and the rows that the trainer reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_dft.data.schema import RowError, parse_row
from megatron_dft.rollout.prompts import Skips
from megatron_dft.rollout.rewards import Rewarded

KEEP = ("correct", "best", "all", "pairs")
DEDUPE = ("text", "answer", "none")
WEIGHTS = ("one", "reward", "prompt")


@dataclass(frozen=True)
class KeepRules:
    """keep: samples of at least `threshold`, a prompt's best ones, or all with a reward; "pairs":
    all, which pairs.py then puts together.

    per_prompt: most samples of a prompt, None for all ("best": 1). dedupe: a prompt's samples of
    one text, or of one answer, count once. weight: 1, the reward, or 1 / kept samples of the
    prompt. cut: keep samples that --max-tokens cut off too.
    """

    keep: str = "correct"
    threshold: float = 1.0
    per_prompt: int | None = None
    dedupe: str = "text"
    weight: str = "one"
    cut: bool = False

    def check(self) -> None:
        if self.per_prompt is not None and self.per_prompt < 1:
            raise ValueError(f"--per-prompt: expected 1 or more, got {self.per_prompt}")
        if self.keep == "pairs" and self.weight != "one":
            raise ValueError(
                f"--weight {self.weight}: --keep pairs takes 'one', a pair has no weight; drop it"
            )


def select(
    rewarded: Iterable[Rewarded], rules: KeepRules, raw: bool = False
) -> tuple[list[Rewarded], Skips]:
    """The kept samples, ordered by prompt and sample, and what was left out, by kind.

    A sample that the trainer's reader would refuse (a NUL character, say) is left out too.

    Of a prompt's equals the one with the lowest sample number stays: samples are drawn alike, so
    that this choice favours nothing.
    """
    kept: list[Rewarded] = []
    left = Skips()
    for _, group in groupby(rewarded, key=lambda one: one.prompt.number):
        usable = list(_usable(group, rules, raw, left))
        if rules.keep == "best":
            usable.sort(key=lambda one: (-one.reward, one.sample))  # type: ignore[operator]
        unique = list(_unique(usable, rules.dedupe, left))
        most = rules.per_prompt or (1 if rules.keep == "best" else len(unique))
        if rules.keep == "pairs":
            most = len(unique)
        for one in unique[most:]:
            left.add("more of a prompt than are kept", _where(one))
        kept += sorted(unique[:most], key=lambda one: one.sample)
    return kept, left


def training_rows(kept: list[Rewarded], rules: KeepRules, raw: bool) -> Iterator[dict[str, Any]]:
    """Rows in the layouts that training reads, with `reward` and `weight`.

    raw: the prompt was continued without a chat template, so the row is a prompt and completion.
    """
    for _, group in groupby(kept, key=lambda one: one.prompt.number):
        members = list(group)
        for one in members:
            weight = {"one": 1.0, "reward": one.reward, "prompt": 1.0 / len(members)}[rules.weight]
            place = {"prompt_number": one.prompt.number, "sample_number": one.sample}
            yield {**_layout(one, raw), "reward": one.reward, "weight": weight, **place}


def _layout(one: Rewarded, raw: bool) -> dict[str, Any]:
    if raw:
        return {"prompt": one.prompt.messages[0]["content"], "completion": one.text}
    return {"messages": [*one.prompt.messages, {"role": "assistant", "content": one.text}]}


def _usable(
    group: Iterable[Rewarded], rules: KeepRules, raw: bool, left: Skips
) -> Iterator[Rewarded]:
    for one in group:
        if one.reward is None:
            left.add("without a reward", _where(one))
        elif not one.text.strip():
            left.add("empty", _where(one))
        elif rules.keep == "correct" and one.reward < rules.threshold:
            left.add("not correct", _where(one))
        elif one.finish != "stop" and not rules.cut:
            # Trained on, it would teach to stop in the middle.
            left.add("cut off by --max-tokens", _where(one))
        elif not _readable(one, raw):
            left.add("text that training would refuse", _where(one))
        else:
            yield one


def _readable(one: Rewarded, raw: bool) -> bool:
    try:
        parse_row(_layout(one, raw), None)
    except RowError:
        return False
    return True


def _unique(usable: list[Rewarded], dedupe: str, left: Skips) -> Iterator[Rewarded]:
    seen: set[str] = set()
    for one in usable:
        key = " ".join(one.text.split())
        if dedupe == "answer" and one.verdict.answer is not None:
            key = one.verdict.answer
        if dedupe != "none" and key in seen:
            left.add("like another of its prompt", _where(one))
            continue
        seen.add(key)
        yield one


def _where(one: Rewarded) -> str:
    return f"{one.prompt.where}, sample {one.sample}"
