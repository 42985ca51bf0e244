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

# kind → the two calculations in order; `_` is the result of the first.
STEPS = {
    "product plus": (("a", "*", "b"), ("_", "+", "c")),
    "product minus": (("a", "*", "b"), ("_", "-", "c")),
    "sum minus": (("a", "+", "b"), ("_", "-", "c")),
    "sum times": (("a", "+", "b"), ("_", "*", "c")),
}

TRAIN_TEMPLATES = {
    "product plus": (
        "{name} buys {a} boxes with {b} {thing} in each box and finds {c} more {thing} at home. "
        "How many {thing} does {name} have?",
        "There are {a} rows of {b} {thing}. {name} puts {c} extra {thing} on the table. "
        "How many {thing} are there in all?",
        "{name} had {c} {thing}. Then {name} filled {a} bags with {b} {thing} each. "
        "How many {thing} are there now?",
        "{a} friends give {name} {b} {thing} each, and {name} makes {c} more. "
        "How many {thing} is that in total?",
        "Besides {c} loose {thing}, there are {a} bundles of {b} {thing}. "
        "How many {thing} are there altogether?",
    ),
    "product minus": (
        "{name} has {a} packs of {b} {thing}. {name} gives away {c} {thing}. "
        "How many {thing} are left?",
        "A shop has {a} shelves with {b} {thing} on each shelf. {name} buys {c} {thing}. "
        "How many {thing} remain in the shop?",
        "{name} carries {a} baskets of {b} {thing}, but {c} {thing} fall out. "
        "How many {thing} does {name} still have?",
        "Every month for {a} months {name} saves {b} {thing}. Then {c} {thing} get lost. "
        "How many {thing} does {name} have?",
        "There are {b} {thing} in each of {a} drawers. Visitors borrow {c} of the {thing}. "
        "How many {thing} are still there?",
    ),
    "sum minus": (
        "{name} has {a} {thing} and gets {b} more. Then {name} loses {c} {thing}. "
        "How many {thing} does {name} have now?",
        "There are {a} {thing} in one box and {b} {thing} in another. {name} takes {c} of them. "
        "How many {thing} are left?",
        "{name} finds {a} {thing} in the morning and {b} at noon, and sells {c} in the evening. "
        "How many {thing} remain?",
        "A sister gave {name} {a} {thing} and a brother {b}. Later {c} of them went missing. "
        "How many {thing} were not missing?",
        "{name} put {a} old and {b} new {thing} in a bag. {c} {thing} fell out. "
        "How many {thing} stayed in the bag?",
    ),
    "sum times": (
        "Each box holds {a} red {thing} and {b} blue {thing}. {name} has {c} boxes. "
        "How many {thing} does {name} have?",
        "Every day {name} makes {a} {thing} before lunch and {b} {thing} after lunch. "
        "How many {thing} does {name} make in {c} days?",
        "{name} packs {a} big and {b} small {thing} into every bag. "
        "How many {thing} are in {c} bags?",
        "{c} friends own {a} round {thing} and {b} square {thing} each. "
        "How many {thing} do the friends own together?",
        "A set has {a} {thing}, with {b} spare {thing} added. {name} orders {c} sets. "
        "How many {thing} arrive?",
    ),
}

HELD_OUT_TEMPLATES = {
    "product plus": (
        "{name} received {c} {thing} from a friend and then bought {a} trays holding {b} {thing} "
        "each. What is the total number of {thing}?",
        "A truck brings {a} crates, and every crate contains {b} {thing}. {name} adds {c} {thing}. "
        "What is the total number of {thing}?",
    ),
    "product minus": (
        "A baker arranges {thing} on {a} plates, {b} on every plate. Customers take {c} of them. "
        "How many {thing} stay on the plates?",
        "{name} collects {b} {thing} a week for {a} weeks and then throws away {c}. "
        "How many {thing} does {name} keep?",
    ),
    "sum minus": (
        "{name} owned {a} {thing}. A neighbour brought {b} more, but {c} were broken. "
        "How many good {thing} are there?",
        "On Monday {name} picked {a} {thing}, on Tuesday {b}. {name} ate {c} of the {thing}. "
        "How many {thing} were not eaten?",
    ),
    "sum times": (
        "{c} children each bring {a} old {thing} and {b} new {thing}. "
        "How many {thing} do the children bring together?",
        "A ticket gives {name} {a} {thing} plus a bonus of {b} {thing}. "
        "How many {thing} does {name} get for {c} tickets?",
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


def solve(kind: str, a: int, b: int, c: int) -> tuple[str, int]:
    """The worked solution and its answer."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    values = {"a": a, "b": b, "c": c}
    lines = []
    for left, operator, right in STEPS[kind]:
        result = operations[operator](values[left], values[right])
        lines.append(f"{values[left]} {operator} {values[right]} = {result}")
        values["_"] = result
    return "\n".join([*lines, f"#### {values['_']}"]), values["_"]


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
    triples = list(itertools.product(range(2, 10), range(2, 10), range(2, 10)))
    triples = [t for t in triples if len(set(t)) == 3]
    rng.shuffle(triples)
    held_out = len(triples) // 4
    pools: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for kind in STEPS:
        for pool, part in zip(pools, (triples[held_out:], triples[:held_out]), strict=True):
            pool[kind] = [t for t in part if solve(kind, *t)[1] > 0]
            rng.shuffle(pool[kind])
    return pools


def _problems(pool, templates, names, things, rng) -> Iterator[Problem]:
    kinds = list(STEPS)
    supply = {kind: itertools.cycle(pool[kind]) for kind in kinds}
    for i in itertools.count():
        kind = kinds[i % len(kinds)]
        numbers = next(supply[kind])
        fields = dict(zip("abc", numbers, strict=True), name=rng.choice(names))
        question = rng.choice(templates[kind]).format(thing=rng.choice(things), **fields)
        solution, answer = solve(kind, *numbers)
        yield Problem(kind, numbers, question, solution, answer)


def make_problems(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """`train` and `held_out` problems, the kinds in turn, deterministic in `seed`.

    Raises ValueError where more problems are asked for than each set has of distinct numbers.
    """
    rng = random.Random(seed)
    train_pool, held_out_pool = _number_pools(rng)
    for name, count, pool in (("train", train, train_pool), ("held-out", held_out, held_out_pool)):
        most = len(STEPS) * min(map(len, pool.values()))
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
