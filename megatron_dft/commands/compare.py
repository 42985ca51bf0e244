"""`megatron-dft compare RUN…`: the runs of a sweep side by side, from what they logged."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dft.drift import run_conclusions, run_report
from megatron_dft.drift.page import Cell, number
from megatron_dft.drift.run_log import read_runs
from megatron_dft.storage.terminal import visible

SUMMARY = "a table and curves of your own runs, of a sweep say, finished or not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's directory, or that of a sweep: every directory below it with TensorBoard's "
        "event files (--tensorboard-dir RUN_DIR/tensorboard) is a run",
    )
    parser.add_argument(
        "--labels", nargs="+", help="a name for each run (default: what differs of the paths)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="directory for compare.html, .csv, .json and the pictures (%(default)s)",
    )


def _aligned(rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
    """Lines with every column as wide as it needs: nothing is cut, a narrow terminal wraps."""
    texts = [[number(cell) for cell in row] for row in rows]
    wide = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        yield "  ".join(text.ljust(n) for text, n in zip(row, wide, strict=True)).rstrip()


def run(args: argparse.Namespace) -> int:
    runs = read_runs(args.runs, args.labels)
    page = run_report.write(args.out, runs)
    columns, rows = run_report.table(runs)
    for line in _aligned([columns, *rows]):
        print(visible(line))
    print(": ".join(run_conclusions.verdict(runs)))
    for warning in run_conclusions.warnings(runs):
        print(visible(warning))
    print(f"report: {page}")
    return 0
