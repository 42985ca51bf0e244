"""The study's language: two skills, facts and general text, all from a seed, in a few words.

Rows are `{"prompt", "completion"}`, taken verbatim by the training data path; words are separated
by spaces and each is one token. All prompts of one kind have the same length.

- addition, `add 4 7 + 3 8 =` → `5 8 0` (units first): the strong-prior task;
- sorting, `sort 5 1 4 1 3 =` → `1 1 3 4 5`: a skill that tuning never shows, to see what is lost;
- facts, `where is ka lo mi ?` → `ru ta`: old ones are in the pre-training, new ones in no model;
- general text: sentences of a small grammar, without a prompt.
"""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, str]

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROW_TOKENS = 16  # the longest row, with BOS and EOS; training's --seq-length
OLD_FACTS = 64
HELD_OUT_SUMS = 1000

_DIGITS = [str(d) for d in range(10)]
_SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]
_NOUNS = "fox bird king river child stone tree ship dog horse cloud friend house garden".split()
_ADJECTIVES = "old small red quiet young dark warm strange".split()
_VERBS = "sees follows finds likes hears remembers leaves paints".split()
_PLACES = "near under behind above beside".split()
_WORDS = [
    *"add sort where is + = ? the a and .".split(),
    *_NOUNS,
    *_ADJECTIVES,
    *_VERBS,
    *_PLACES,
]

# Verbs and places go with the noun before them: a text has something to be remembered.
_HABITS = {
    noun: (random.Random(f"verb {i}").sample(_VERBS, 2), random.Random(f"{i}").choice(_PLACES))
    for i, noun in enumerate(_NOUNS)
}


def vocabulary() -> list[str]:
    """Every token, in the order of its id."""
    return [PAD, BOS, EOS, *_DIGITS, *_SYLLABLES, *_WORDS]


def _row(prompt: Iterable[str], completion: Iterable[str]) -> Row:
    return {"prompt": " ".join(prompt), "completion": " " + " ".join(completion)}


def _sum_digits(total: int) -> list[str]:
    return list(reversed(f"{total:03d}"))


def addition(a: int, b: int, answer: int | None = None) -> Row:
    """a, b: 0 to 99. answer: what the row claims, where it is not the sum."""
    total = a + b if answer is None else answer
    return _row(["add", *f"{a:02d}", "+", *f"{b:02d}", "="], _sum_digits(total))


def sorting(digits: list[int]) -> Row:
    words = [str(d) for d in digits]
    return _row(["sort", *words, "="], sorted(words))


def _sums() -> list[tuple[int, int]]:
    pairs = list(itertools.product(range(100), repeat=2))
    random.Random("sums").shuffle(pairs)
    return pairs


def held_out_sums() -> list[tuple[int, int]]:
    """Pairs that are in no training data at all."""
    return _sums()[:HELD_OUT_SUMS]


def seen_sums() -> list[tuple[int, int]]:
    return _sums()[HELD_OUT_SUMS:]


def _facts(count: int, draw: random.Random, taken: set[tuple[str, ...]]) -> list[Row]:
    rows = []
    while len(rows) < count:
        name = tuple(draw.choices(_SYLLABLES, k=3))
        if name not in taken:
            taken.add(name)
            rows.append(_row(["where", "is", *name, "?"], draw.choices(_SYLLABLES, k=2)))
    return rows


def _name(fact: Row) -> tuple[str, ...]:
    return tuple(fact["prompt"].split()[2:5])


def old_facts() -> list[Row]:
    return _facts(OLD_FACTS, random.Random("old facts"), set())


def new_facts(count: int, seed: int) -> list[Row]:
    """Facts about names that no old fact is about."""
    return _facts(count, random.Random(f"new facts {seed}"), {_name(f) for f in old_facts()})


def sentence(draw: random.Random) -> str:
    """Ten to fourteen words."""

    def thing(noun: str) -> list[str]:
        adjective = [draw.choice(_ADJECTIVES)] if draw.random() < 0.5 else []
        return [draw.choice(("the", "the", "a")), *adjective, noun]

    subject, target, place = draw.choices(_NOUNS, k=3)
    verbs, preposition = _HABITS[subject]
    words = [*thing(subject), draw.choice(verbs), *thing(target), preposition, *thing(place), "."]
    return " ".join(words)


def general_text(count: int, seed: str) -> list[str]:
    draw = random.Random(seed)
    return [sentence(draw) for _ in range(count)]


def _wrong_sum(draw: random.Random, right: int) -> int:
    """The sum of some other pair."""
    while (answer := draw.randrange(100) + draw.randrange(100)) == right:
        pass
    return answer


def pretraining(rows: int, wrong: float) -> list[Row]:
    """Sums, of which the share `wrong` is wrong, sorted digits, old facts and general text."""
    draw = random.Random("pre-training")
    pairs, facts = seen_sums(), old_facts()
    texts = iter(general_text(rows, "general text to learn"))
    mixed: list[Row] = []
    for _ in range(rows):
        kind = draw.random()
        if kind < 0.45:
            a, b = draw.choice(pairs)
            mixed.append(addition(a, b, _wrong_sum(draw, a + b) if draw.random() < wrong else None))
        elif kind < 0.65:
            mixed.append(sorting(draw.choices(range(10), k=5)))
        elif kind < 0.80:
            mixed.append(draw.choice(facts))
        else:
            mixed.append({"prompt": "", "completion": next(texts)})
    return mixed


def noisy_sums(count: int, wrong: float, seed: int) -> list[Row]:
    """Demonstrations of additions; the share `wrong` of them claims some other pair's sum."""
    draw = random.Random(f"noisy sums {seed}")
    rows = []
    for index, (a, b) in enumerate(draw.sample(seen_sums(), count)):
        answer = _wrong_sum(draw, a + b) if index < round(count * wrong) else a + b
        rows.append(addition(a, b, answer))
    draw.shuffle(rows)
    return rows


def clean_sums(count: int) -> list[Row]:
    return [addition(a, b) for a, b in held_out_sums()[:count]]


def sorting_problems(count: int) -> list[Row]:
    draw = random.Random("sorting to test")
    return [sorting(draw.choices(range(10), k=5)) for _ in range(count)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
