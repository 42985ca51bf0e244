"""The paper's data as files: NuminaMath-CoT 100k, and five test sets with one pair of columns.

    python examples/math/data.py --out runs/math/data
    python examples/math/data.py --out runs/math/data --rehearse     50 rows from a seed, no network

Hub names can be replaced: --train-from DATASET, --set-from NAME=DATASET[:SPLIT]. Rows of a test set
become `{"prompt", "answer"}`, training rows `messages`.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TRAIN = "AI-MO/NuminaMath-CoT"
# name → (data set on the hub, split); the paper's five, in its order.
SETS = {
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "minerva": ("math-ai/minervamath", "test"),
    "olympiad": ("math-ai/olympiadbench", "test"),
    "aime24": ("math-ai/aime24", "test"),
    "amc23": ("math-ai/amc23", "test"),
}
ASKED = ("problem", "question", "prompt")
ANSWERED = ("answer", "final_answer", "solution")


def test_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Prompt and answer, wherever the data set keeps them; a list of one answer is that answer."""
    prompt = next((row[c] for c in ASKED if row.get(c)), None)
    answer = next((row[c] for c in ANSWERED if row.get(c) not in (None, "", [])), None)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if prompt is None or answer is None or isinstance(answer, list):
        raise ValueError(
            f"columns {sorted(row)}: expected one of {ASKED} and one of {ANSWERED}; give another "
            "data set with --set-from"
        )
    return {"prompt": str(prompt), "answer": str(answer)}


def train_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation; the last answer is its solution."""
    if row.get("messages"):
        return {"messages": row["messages"]}
    turns = (("user", row["problem"]), ("assistant", row["solution"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_suffix(".part")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)
    print(f"{path}: {sum(1 for _ in open(path, encoding='utf-8')):,} rows")


def rehearsal(out: Path, rows: int) -> None:
    """Sums in place of olympiads, boxed as the paper's data have them."""
    draws = random.Random(1)

    def problem() -> dict[str, str]:
        a, b = draws.randint(2, 99), draws.randint(2, 99)
        return {"prompt": f"What is ${a} + {b}$?", "answer": str(a + b)}

    def solved(row: dict[str, str]) -> dict[str, Any]:
        solution = f"The sum is $\\boxed{{{row['answer']}}}$."
        return train_row({"problem": row["prompt"], "solution": solution})

    write(out / "train.jsonl", (solved(problem()) for _ in range(rows)))
    for name in SETS:
        write(out / f"{name}.jsonl", (problem() for _ in range(4)))


def from_hub(out: Path, args: argparse.Namespace) -> None:
    import datasets

    sources = dict(SETS)
    for item in args.set_from:
        name, _, place = item.partition("=")
        if name not in SETS or not place:
            sys.exit(f"error: --set-from {item!r}: expected NAME=DATASET[:SPLIT], of {[*SETS]}")
        dataset, _, split = place.partition(":")
        sources[name] = (dataset, split or "test")
    train = datasets.load_dataset(args.train_from, split="train")
    # The paper takes 100,000 rows and does not say which.
    train = train.shuffle(seed=args.seed).select(range(min(args.rows, len(train))))
    write(out / "train.jsonl", map(train_row, train))
    for name, (dataset, split) in sources.items():
        write(out / f"{name}.jsonl", map(test_row, datasets.load_dataset(dataset, split=split)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000, help="training rows (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which of them (%(default)s)")
    parser.add_argument("--train-from", default=TRAIN, help="%(default)s")
    parser.add_argument("--set-from", nargs="+", default=[], metavar="NAME=DATASET[:SPLIT]")
    parser.add_argument("--rehearse", action="store_true", help="50 made rows, no network")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        rehearsal(args.out, min(args.rows, 50))
    else:
        from_hub(args.out, args)


if __name__ == "__main__":
    main()
