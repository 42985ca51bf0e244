"""The quickstart's last word: scores before and after as one table; status 1 without a gain."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def step_seconds(log: str) -> list[float]:
    """Seconds of each training step in Megatron's log, the first (which warms up) left out."""
    return [float(ms) / 1000 for ms in STEP_MS.findall(log)][1:]


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def build(before: dict, after: dict, work: Path, row_tokens: int, seconds: float) -> Table:
    """The table from both score files, Megatron's log and the wall times."""
    steps = step_seconds((work / "train.log").read_text(encoding="utf-8", errors="replace"))
    training = float((work / "train.seconds").read_text())
    speed = f"{row_tokens / statistics.median(steps):.0f}" if steps else "unknown"

    def right(scores: dict) -> str:
        return f"{scores['correct']} ({scores['accuracy']:.1%})"

    table = Table(title="DFT on Megatron's training loop, CPU")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    problems = after["problems"]
    table.add_row(f"exact match, {problems} held-out problems", right(before), right(after))
    for label, name in (
        ("plain cross entropy, nats a token", "cross_entropy"),
        ("mean target probability", "mean_target_probability"),
    ):
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    table.add_section()
    table.add_row(f"training tokens/s, median of {len(steps)} steps", "", speed)
    table.add_row("training, wall time with start-up and export", "", duration(training))
    table.add_row("this run, wall time without installation", "", duration(seconds))
    table.caption = f"Hugging Face checkpoint: {work / 'tuned'}"
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the quickstart's run directory")
    parser.add_argument("--row-tokens", type=int, required=True, help="tokens of one step")
    parser.add_argument("--seconds", type=float, required=True, help="[seconds] wall time so far")
    args = parser.parse_args()
    before, after = (
        json.loads((args.work / f"{name}.json").read_text()) for name in ("before", "after")
    )
    console = Console(soft_wrap=True)
    sample = after["samples"][0]
    console.print(f"\n{sample['question']}", style="bold", highlight=False)
    for name, scores in (("before", before), ("after", after)):
        console.print(f"[{name}] {scores['samples'][0]['reply']}", markup=False, highlight=False)
    console.print()
    console.print(build(before, after, args.work, args.row_tokens, args.seconds))
    if after["correct"] <= before["correct"]:
        print("error: the model answers no better than before training", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
