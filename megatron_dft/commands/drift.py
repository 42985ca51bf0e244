"""`megatron-dft drift BASE TUNED [TUNED2 …]`: what training changed, measured on the weights."""

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_dft.drift import report
from megatron_dft.drift.checkpoint import Checkpoint, open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.labels import labels_for
from megatron_dft.drift.page import number
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary

SUMMARY = (
    "measure what fine-tuning changed in the weights: norms, sparsity, layers, rank, subspaces"
)
LOAD_DTYPES = ("bfloat16", "float16", "float32")


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
        "--principal-k",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        metavar="K",
        help="for each K, the share of the update in the base's K leading singular directions; 0 "
        "leaves it out, which saves most of the time of a large model (%(default)s)",
    )
    parser.add_argument(
        "--load-dtype",
        choices=LOAD_DTYPES,
        help="dtype in which a weight counts as changed (default: the coarsest one stored)",
    )
    parser.add_argument(
        "--workers", type=int, help="processes (default: all cores this one may use)"
    )


def compare(
    base: Path,
    tuned: list[Path],
    labels: list[str],
    workers: int | None = None,
    principal_ks: list[int] | None = None,
    load_dtype: str | None = None,
) -> dict[str, Any]:
    """The report's numbers. Shows a progress bar on stderr. ValueError for unfit checkpoints."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    left, rights = open_checkpoint(base), [open_checkpoint(p) for p in tuned]
    matches = [match(left, right) for right in rights]
    summary = Summary(labels)
    rounding = getattr(torch, load_dtype) if load_dtype else None
    comparison = Comparison(
        left,
        rights,
        matches[0].names,
        workers,
        principal_ks=principal_ks or (),
        load_dtype=rounding,
    )
    total = sum(left.tensors[n].nbytes for n in matches[0].names)
    columns = (TextColumn("drift"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("drift", total=total)
        for tensor in comparison.run():
            summary.add(tensor)
            progress.advance(task, left.tensors[tensor.name].nbytes)
    result = {
        "format": report.FORMAT,
        "load_dtype": load_dtype or "stored",
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
    ks = sorted({k for k in args.principal_k if k})
    if ks and ks[0] < 0:
        raise ValueError(f"--principal-k: expected numbers from 1, or 0 for none, got {ks[0]}")
    result = compare(args.base, args.tuned, labels, args.workers, ks, args.load_dtype)
    report.write(args.out, result, None)
    shown = ("update_norm", "relative_norm", "unchanged", "unchanged_bf16", "changed_near_zero")
    for label in labels:
        model = result["methods"][label]["model"]
        print(f"{label}: " + ", ".join(f"{k} {number(model[k])}" for k in shown))
    print(f"report: {args.out / 'report.html'}")
    return 0
