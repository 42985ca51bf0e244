"""The rows that the methods train on: problems, demonstrations, and pairs of a model's own answers.

All are additions of the study's language (`corpus`), each of a seed's problems in all of them.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import corpus

Row = dict[str, Any]


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problems(demonstrations: Iterable[corpus.Row]) -> list[Row]:
    """Their questions with the right answers, whatever the demonstrations claim.

    The prompt ends with the blank that the answer would begin with: a model's own text has none.
    """
    found = []
    for row in demonstrations:
        _, a1, a0, _, b1, b0, _ = row["prompt"].split()
        right = corpus.addition(int(a1 + a0), int(b1 + b0))
        found.append({"prompt": right["prompt"] + " ", "answer": right["completion"].strip()})
    return found


def pairs(rewards: Path) -> list[Row]:
    """A right and a wrong answer of each problem that has both, from what `verify` wrote."""
    found = []
    texts = {row["prompt"]: row["messages"][0]["content"] for row in _read(_prompts(rewards))}
    for number, group in groupby(_read(rewards), key=lambda row: row["prompt"]):
        samples = list(group)
        right = [s["text"] for s in samples if s["reward"] == 1.0]
        wrong = [s["text"] for s in samples if s["reward"] == 0.0 and s["finish"] == "stop"]
        if right and wrong:
            found.append({"prompt": texts[number], "chosen": right[0], "rejected": wrong[0]})
    return found


def _prompts(rewards: Path) -> Path:
    """The sampled directory stands beside what was made of it."""
    return rewards.parent / "samples" / "prompts.jsonl"


def validation(count: int) -> list[corpus.Row]:
    """Problems that choose learning rates: in no training, and not among those that score."""
    return [corpus.addition(a, b) for a, b in corpus.held_out_sums()[-count:]]
