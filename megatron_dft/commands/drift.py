"""`megatron-dft drift BASE TUNED [TUNED2 …]`: what training changed, measured on the weights."""

import argparse
from pathlib import Path
from typing import Any

from megatron_dft.drift import report
from megatron_dft.drift.checkpoint import Checkpoint, open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.page import number
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary

SUMMARY = "measure what fine-tuning changed in the weights: norms, sparsity, layers, rank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="the model that training started from")
    parser.add_argument(
        "tuned",
        type=Path,
        nargs="+",
        help="its fine-tuned versions: Hugging Face directories, or torch_dist like BASE",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("drift-report"),
        help="directory for report.html, drift.json, drift.csv and the pictures (%(default)s)",
    )
    parser.add_argument(
        "--labels", nargs="+", help="a name for each TUNED (default: its directory's name)"
    )
    parser.add_argument(
        "--workers", type=int, help="processes (default: all cores this one may use)"
    )


def labels_for(paths: list[Path], given: list[str] | None) -> list[str]:
    """One distinct label a path. Raises ValueError if `given` does not fit."""
    if given is not None:
        if len(given) != len(paths) or len(set(given)) != len(given):
            raise ValueError(
                f"--labels: expected {len(paths)} different names (one for each TUNED), got "
                f"{' '.join(given)}; name each once"
            )
        return given
    names = [p.resolve().name for p in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{n}-{i + 1}" for i, n in enumerate(names)]


def compare(
    base: Path, tuned: list[Path], labels: list[str], workers: int | None = None
) -> dict[str, Any]:
    """The report's numbers. Shows a progress bar on stderr. ValueError for unfit checkpoints."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    left, rights = open_checkpoint(base), [open_checkpoint(p) for p in tuned]
    matches = [match(left, right) for right in rights]
    summary = Summary(labels)
    comparison = Comparison(left, rights, matches[0].names, workers)
    total = sum(left.tensors[n].nbytes for n in matches[0].names)
    columns = (TextColumn("drift"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("drift", total=total)
        for tensor in comparison.run():
            summary.add(tensor)
            progress.advance(task, left.tensors[tensor.name].nbytes)
    result = {
        "format": 1,
        "base": str(base),
        "tuned": dict(zip(labels, map(str, tuned), strict=True)),
        "notes": list(dict.fromkeys(note for m in matches for note in m.notes)),
        **summary.report(matches[0].names),
    }
    _add_token_texts(result, left)
    return result


def _add_token_texts(result: dict[str, Any], base: Checkpoint) -> None:
    """Name the rows of the token tables where the base has a fast tokenizer's file."""
    file = base.path / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    for method in result["methods"].values():
        for rows in method["tokens"].values():
            for token in rows["top"]:
                text = tokenizer.decode([token["id"]], skip_special_tokens=False)
                token["text"] = repr(text) if text else repr(tokenizer.id_to_token(token["id"]))


def run(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers: expected 1 or more processes, got {args.workers}")
    labels = labels_for(args.tuned, args.labels)
    result = compare(args.base, args.tuned, labels, args.workers)
    report.write(args.out, result, None)
    shown = ("update_norm", "relative_norm", "unchanged_bf16", "top1pct_share")
    for label in labels:
        model = result["methods"][label]["model"]
        print(f"{label}: " + ", ".join(f"{k} {number(model[k])}" for k in shown))
    print(f"report: {args.out / 'report.html'}")
    return 0
