"""`megatron-dft retention BASE TUNED [TUNED2 …]`: does the tuned model still talk like its base?"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_dft.data import scored_text
from megatron_dft.data.reading import Reading, parse_columns
from megatron_dft.drift import report, sampling
from megatron_dft.drift.labels import labels_for
from megatron_dft.drift.page import number
from megatron_dft.drift.retention import measure
from megatron_dft.drift.scoring import load_model, windows
from megatron_dft.flags.data import add_layout

SUMMARY = "perplexity, KL to the base and top-1 agreement on held-out text and on the task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="the model that training started from")
    parser.add_argument("tuned", type=Path, nargs="+", help="its fine-tuned versions")
    parser.add_argument(
        "--text", type=Path, help='held-out general text: JSON lines with a "text" field'
    )
    parser.add_argument(
        "--task", help="held-out conversations of the task, in any layout that training reads"
    )
    parser.add_argument(
        "--task-samples",
        type=int,
        default=0,
        metavar="N",
        help="also on answers that the base itself samples to N of the task's prompts: there the "
        "KL is the one found to predict forgetting (arXiv 2509.04259)",
    )
    parser.add_argument(
        "--max-answer-tokens", type=int, default=128, help="of a sampled answer (%(default)s)"
    )
    add_layout(parser)
    parser.add_argument("--labels", nargs="+", help="a name for each TUNED")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("drift-report"),
        help="report directory; with drift's numbers in it, the page shows both (%(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=50_000, help="scored tokens a file (%(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=512, help="tokens that a model sees at once (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument("--chat-template", help="Jinja file in place of the tokenizer's template")


def _check(args: argparse.Namespace) -> None:
    if args.text is None and args.task is None:
        raise ValueError("--text or --task: expected at least one held-out file, got none")
    for flag, value, least in (
        ("--max-tokens", args.max_tokens, 1),
        ("--window", args.window, 2),
        ("--task-samples", args.task_samples, 0),
        ("--max-answer-tokens", args.max_answer_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{flag}: expected {least} or more, got {value}")
    if args.task_samples and args.task is None:
        raise ValueError(f"--task-samples {args.task_samples}: expected --task beside it; add it")


def _texts(args: argparse.Namespace, base: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """Name of each text → its windows, and notes for the page's reader."""
    texts: dict[str, list[Any]] = {}
    notes = []
    if args.text is not None:
        tokenizer = scored_text.tokenizer_of(args.base, chat=False)
        texts["general"] = scored_text.plain_text(args.text, tokenizer)
    if args.task is not None:
        tokenizer = scored_text.tokenizer_of(args.base, args.chat_template)
        texts["task"] = rows = scored_text.conversations(
            [args.task], tokenizer, "--task", Reading(args.data_format, parse_columns(args.columns))
        )
        if args.task_samples:
            prompts = sampling.prompts_of(rows, args.task_samples)
            ends = sampling.end_ids(base, tokenizer)
            print(f"retention: {len(prompts)} answers of the base", file=sys.stderr)
            answers = sampling.sample_answers(base, prompts, ends, args.max_answer_tokens)
            texts["task, base's answers"] = answers
    for name, rows in texts.items():
        rows, cut = scored_text.limit(rows, args.max_tokens)
        texts[name] = list(windows(rows, args.window))
        if cut:
            notes.append(f"{name}: a random part of the file, about {args.max_tokens:,} tokens.")
    return texts, notes


def run(args: argparse.Namespace) -> int:
    labels = labels_for(args.tuned, args.labels)
    _check(args)
    base = load_model(args.base, args.device)
    texts, notes = _texts(args, base)
    methods: dict[str, dict[str, Any]] = {}
    for label, path in zip(labels, args.tuned, strict=True):
        tuned = load_model(path, args.device)
        methods[label] = {}
        for name, rows in texts.items():
            print(f"retention: {label} on {name}, {len(rows)} windows", file=sys.stderr)
            methods[label][name] = values = measure(base, tuned, rows)
            figures = ", ".join(f"{k} {number(v)}" for k, v in values.items())
            print(f"{label} {name}: {figures}")
        del tuned
    result = {
        "format": report.FORMAT,
        "base": str(args.base),
        "tuned": dict(zip(labels, map(str, args.tuned), strict=True)),
        "texts": list(texts),
        "notes": notes,
        "methods": methods,
    }
    report.write(args.out, None, result)
    print(f"report: {args.out / 'report.html'}")
    return 0
