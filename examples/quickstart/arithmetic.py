"""Two-step arithmetic word problems with worked solutions, from a seed: the quickstart's data.

    python examples/quickstart/arithmetic.py --out runs/quickstart/data --seed 1

Training and held-out problems share neither a wording nor a triple of numbers: a model that only
memorised sentences or sums scores nothing. Rows are `{"messages": [system, user, assistant]}`; the
solution does one calculation a line and ends in `#### <answer>`.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = (
    "Solve the problem. Write one calculation per line, then a last line '#### ' with the answer."
)

# kind → the two operators; the numbers stand in the question in the order of the calculation.
KINDS = {
    "add add": "++",
    "add take": "+-",
    "take add": "-+",
    "times add": "*+",
    "times take": "*-",
}

TRAIN_TEMPLATES = {
    "add add": (
        "{name} has {a} {thing} and gets {b} more from a friend. Then {name} buys {c} more. "
        "How many {thing} does {name} have?",
        "There are {a} {thing} in a box, {b} in a bag and {c} on the table. "
        "How many {thing} are there in total?",
        "{name} finds {a} {thing} on Monday, {b} on Tuesday and {c} on Sunday. "
        "How many {thing} does {name} find?",
        "{name} owns {a} red {thing}, {b} blue {thing} and {c} green {thing}. "
        "How many {thing} does {name} own?",
    ),
    "add take": (
        "{name} has {a} {thing} and gets {b} more. Then {name} loses {c} {thing}. "
        "How many {thing} does {name} have now?",
        "There are {a} {thing} in one box and {b} in another. {name} takes {c} of them away. "
        "How many {thing} are left?",
        "{name} finds {a} {thing} in the morning and {b} at noon, and sells {c} in the evening. "
        "How many {thing} remain?",
        "A sister gives {name} {a} {thing} and a brother gives {b}. {name} gives {c} to a friend. "
        "How many {thing} does {name} keep?",
    ),
    "take add": (
        "{name} has {a} {thing} and gives away {b}. Then {name} gets {c} new {thing}. "
        "How many {thing} does {name} have now?",
        "There are {a} {thing} in a shop. People buy {b} of them, and {c} new {thing} arrive. "
        "How many {thing} are in the shop?",
        "{name} carries {a} {thing}. {b} of them fall down, and {name} picks up {c} others. "
        "How many {thing} does {name} carry?",
        "From {a} {thing} {name} loses {b}, and later finds {c} more. "
        "How many {thing} does {name} have?",
    ),
    "times add": (
        "{name} buys {a} boxes with {b} {thing} in each box and finds {c} more {thing}. "
        "How many {thing} does {name} have?",
        "There are {a} rows of {b} {thing}. {name} puts {c} extra {thing} on the table. "
        "How many {thing} are there in all?",
        "{name} fills {a} bags with {b} {thing} each. Then {c} more {thing} arrive. "
        "How many {thing} are there now?",
        "{a} friends give {name} {b} {thing} each, and {name} makes {c} more. "
        "How many {thing} is that in total?",
    ),
    "times take": (
        "{name} has {a} packs of {b} {thing} each and gives away {c} {thing}. "
        "How many {thing} are left?",
        "A shop has {a} shelves with {b} {thing} on each shelf. {name} buys {c} {thing}. "
        "How many {thing} remain in the shop?",
        "{name} carries {a} baskets of {b} {thing} each, but {c} {thing} fall out. "
        "How many {thing} does {name} still have?",
        "There are {a} drawers with {b} {thing} in each drawer. Visitors take {c} {thing}. "
        "How many {thing} are still there?",
    ),
}

HELD_OUT_TEMPLATES = {
    "add add": (
        "{name} picked {a} {thing} before lunch, {b} after lunch and another {c} at night. "
        "What is the total number of {thing}?",
        "A truck brings {a} {thing}, a van brings {b} and a bicycle brings {c}. "
        "How many {thing} do they bring together?",
    ),
    "add take": (
        "{name} owned {a} {thing} and a neighbour brought {b} more, but {c} were broken and thrown "
        "away. How many {thing} were left?",
        "In the garden {name} saw {a} {thing} and then {b} more. The wind took {c} of them. "
        "How many {thing} stayed?",
    ),
    "take add": (
        "{name} started with {a} {thing}, sold {b} of them and then bought {c}. "
        "How many {thing} did {name} end with?",
        "A basket held {a} {thing}. {name} ate {b} of them, and mother added {c} to the basket. "
        "How many {thing} did the basket hold then?",
    ),
    "times add": (
        "A baker arranged {a} plates with {b} {thing} on every plate and kept {c} {thing} in the "
        "kitchen. What is the total number of {thing}?",
        "A truck brings {a} crates, and every crate contains {b} {thing}. {name} adds {c} {thing}. "
        "What is the total number of {thing}?",
    ),
    "times take": (
        "{name} collected {thing} for {a} weeks, {b} every week, and then threw away {c}. "
        "How many {thing} did {name} keep?",
        "A farmer has {a} sacks, and every sack contains {b} {thing}. Mice eat {c} of the {thing}. "
        "How many {thing} are not eaten?",
    ),
}

TRAIN_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry")
HELD_OUT_NAMES = ("Ivy", "Jack", "Kate", "Liam", "Mia", "Noah")
TRAIN_THINGS = ("apples", "books", "pencils", "cards", "coins", "cookies", "stones", "shells")
HELD_OUT_THINGS = ("oranges", "stamps", "marbles", "cakes", "buttons", "eggs")


@dataclass(frozen=True)
class Problem:
    """A word problem; `numbers` are the template's (a, b, c), `solution` ends in `#### answer`."""

    kind: str
    numbers: tuple[int, int, int]
    question: str
    solution: str
    answer: int

    def messages(self) -> list[dict[str, str]]:
        """The conversation: instruction, question, worked solution."""
        return [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.solution},
        ]


def solve(kind: str, a: int, b: int, c: int) -> tuple[str, tuple[int, int]]:
    """The worked solution, and the results of its two calculations."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    first, second = KINDS[kind]
    middle = operations[first](a, b)
    answer = operations[second](middle, c)
    text = f"{a} {first} {b} = {middle}\n{middle} {second} {c} = {answer}\n#### {answer}"
    return text, (middle, answer)


def extract_answer(text: str) -> int | None:
    """The number after the last `####`, else the last number of the text; None where there is none.

    The fallback keeps the score before training fair: a right answer in another form counts.
    """
    number = r"-?\d[\d,]*(?:\.\d+)?"
    found = re.findall(rf"####\s*\$?({number})", text) or re.findall(number, text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return int(value) if value == int(value) else None


def _number_pools(rng: random.Random) -> tuple[dict[str, list], dict[str, list]]:
    """For each kind the (a, b, c) of training and of held-out problems: disjoint over all kinds."""
    triples = list(itertools.product(range(2, 13), range(2, 10), range(2, 10)))
    triples = [t for t in triples if len(set(t)) == 3]
    rng.shuffle(triples)
    held_out = len(triples) // 4
    pools: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for kind in KINDS:
        for pool, part in zip(pools, (triples[held_out:], triples[:held_out]), strict=True):
            pool[kind] = [t for t in part if min(solve(kind, *t)[1]) > 0]
            rng.shuffle(pool[kind])
    return pools


def _problems(pool, templates, names, things, rng) -> Iterator[Problem]:
    kinds = list(KINDS)
    supply = {kind: itertools.cycle(pool[kind]) for kind in kinds}
    for i in itertools.count():
        kind = kinds[i % len(kinds)]
        numbers = next(supply[kind])
        fields = dict(zip("abc", numbers, strict=True), name=rng.choice(names))
        question = rng.choice(templates[kind]).format(thing=rng.choice(things), **fields)
        solution, (_, answer) = solve(kind, *numbers)
        yield Problem(kind, numbers, question, solution, answer)


def make_problems(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """`train` and `held_out` problems, the kinds in turn, deterministic in `seed`.

    Raises ValueError where more problems are asked for than each set has of distinct numbers.
    """
    rng = random.Random(seed)
    train_pool, held_out_pool = _number_pools(rng)
    for name, count, pool in (("train", train, train_pool), ("held-out", held_out, held_out_pool)):
        most = len(KINDS) * min(map(len, pool.values()))
        if not 0 <= count <= most:
            raise ValueError(f"--{name}: expected 0 to {most} problems, got {count}; ask for fewer")
    make = _problems(train_pool, TRAIN_TEMPLATES, TRAIN_NAMES, TRAIN_THINGS, rng)
    test = _problems(held_out_pool, HELD_OUT_TEMPLATES, HELD_OUT_NAMES, HELD_OUT_THINGS, rng)
    return list(itertools.islice(make, train)), list(itertools.islice(test, held_out))


def write_jsonl(path: Path, problems: list[Problem]) -> None:
    """One `{"messages": …}` row a problem."""
    rows = (json.dumps({"messages": p.messages()}, ensure_ascii=False) + "\n" for p in problems)
    path.write_text("".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSONL files")
    parser.add_argument("--train", type=int, default=400, help="number of training problems")
    parser.add_argument("--held-out", type=int, default=200, help="number of held-out problems")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train, held_out = make_problems(args.train, args.held_out, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "held_out.jsonl", held_out)
    print(f"{len(train)} training and {len(held_out)} held-out problems in {args.out}; the first:")
    print(train[0].question, train[0].solution, sep="\n")


if __name__ == "__main__":
    main()
