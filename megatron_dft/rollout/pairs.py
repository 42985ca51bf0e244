"""A right and a wrong answer of the same prompt: the rows of `--loss dpo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from megatron_dft.rollout.prompts import Skips
from megatron_dft.rollout.rewards import Rewarded

Pair = tuple[Rewarded, Rewarded]


def pair_up(
    usable: Sequence[Rewarded], threshold: float, per_prompt: int | None
) -> tuple[list[Pair], Skips]:
    """(chosen, rejected) of a prompt, at most `per_prompt` (None: as many as there are), and what
    was left without a partner, by kind.

    A sample is in one pair: the first right one with the first wrong one, and so on. Samples are
    drawn alike, so this choice favours nothing.

    Args:
        usable: samples with a reward, ordered by prompt and sample. Right: of `threshold` or more.
    """
    pairs: list[Pair] = []
    left = Skips()
    for _, group in groupby(usable, key=lambda one: one.prompt.number):
        members = list(group)
        right = [one for one in members if _is_right(one, threshold)]
        wrong = [one for one in members if not _is_right(one, threshold)]
        number = min(len(right), len(wrong))
        if per_prompt is not None:
            number = min(number, per_prompt)
        pairs += zip(right[:number], wrong[:number], strict=True)
        kind = "without a partner" if right and wrong else "all of a prompt alike"
        for one in (*right[number:], *wrong[number:]):
            left.add(kind, f"{one.prompt.where}, sample {one.sample}")
    return pairs, left


def pair_rows(pairs: Sequence[Pair], raw: bool) -> Iterator[dict[str, Any]]:
    """Rows of prompt, chosen and rejected: lists of messages, or three texts where `raw`."""
    for chosen, rejected in pairs:
        places = {
            "prompt_number": chosen.prompt.number,
            "sample_numbers": [chosen.sample, rejected.sample],
        }
        messages = chosen.prompt.messages
        prompt: Any = messages[0]["content"] if raw else messages
        texts = {"chosen": chosen.text, "rejected": rejected.text}
        answers = texts if raw else {k: [_answer(text)] for k, text in texts.items()}
        yield {"prompt": prompt, **answers, **places}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _is_right(one: Rewarded, threshold: float) -> bool:
    return one.reward is not None and one.reward >= threshold
