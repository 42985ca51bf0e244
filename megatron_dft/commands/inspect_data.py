"""`megatron-dft inspect-data`: what training would read, in figures and in colour."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_dft.data.dataset import ChatDataset, build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.prepare import PrepareOptions, bad_rows, check_bad_rows, notes, tokenised
from megatron_dft.data.reading import Reading
from megatron_dft.data.show import Shown, as_html, print_shown, runs
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.statistics import gather, summary, write_histogram
from megatron_dft.data.store import TokenStore
from megatron_dft.data.template_report import template_report
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer
from megatron_dft.data.vocabulary import vocab_size_of
from megatron_dft.flags import data as flags
from megatron_dft.storage.terminal import visible

SUMMARY = "statistics of chat data, and conversations with the trained tokens coloured"

_BAD_SHOWN = 10
REFUSED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The training command's data flags and what to show."""
    add = parser.add_argument
    add(
        "--tokenizer",
        "--hf-model",
        required=True,
        metavar="PATH",
        help="directory with the tokenizer, sentencepiece .model file, or hub name",
    )
    add("--seq-length", type=int, default=4096, metavar="N", help="positions in a row [tokens]")
    add("--context-parallel-size", type=int, default=1, metavar="N")
    add("--seed", type=int, default=1234, help="seed of the order, as in training")
    add("--show", type=int, default=0, metavar="N", help="print the first N rows' conversations")
    add("--html", metavar="FILE", help="write the conversations of --show to a web page instead")
    add("--histogram", metavar="FILE", help="write the histogram of lengths as a PNG")
    add("--json", metavar="FILE", help="write the figures as JSON")
    add(
        "--loss",
        choices=("rift", "dpo"),
        help="read the rows as it does: signed rewards, or pairs of answers",
    )
    flags.add_arguments(parser.add_argument_group("data, as in training"))


def run(args: argparse.Namespace) -> int:
    """Prints the figures; status 1 where training would refuse the data, with the reason."""
    items = args.train_data or args.valid_data
    flag = "--train-data" if args.train_data else "--valid-data"
    if not items:
        raise ValueError("inspect-data needs --train-data (or --valid-data): what shall it read?")
    tokenizer = load_tokenizer(args.tokenizer, args.chat_template)
    options = flags.dataset_options(args)
    spec = _spec(tokenizer, options)
    stores = _stores(items, flag, spec, options)
    data, refusals = _build(args, items, flag, tokenizer, options, stores)
    console = Console(highlight=False)
    for label, value in _template_lines(spec):
        console.print(Text.assemble((f"{label:20}", "bold"), visible(value)), soft_wrap=True)
    if data is not None:
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        stats = gather(stores, data, args.seq_length, special)
        for label, value in summary(stats, args.seq_length):
            console.print(Text.assemble((f"{label:20}", "bold"), value), soft_wrap=True)
        if args.histogram:
            write_histogram(Path(args.histogram), stats.lengths, args.seq_length)
            console.print(Text(f"histogram of lengths: {args.histogram}"), soft_wrap=True)
        if args.json:
            text = json.dumps(stats.as_dict(), indent=1, ensure_ascii=False)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    for store in stores:
        for line in bad_rows(store)[:_BAD_SHOWN]:
            console.print(Text.assemble(("bad row  ", "bold red"), visible(line)), soft_wrap=True)
        for note, count in notes(store).items():
            line = f"{visible(note)} ({count:,} rows)"
            console.print(Text.assemble(("note     ", "bold yellow"), line), soft_wrap=True)
    if data is not None and (args.show or args.html):
        _show(args, data, tokenizer, console)
    for refusal in refusals:
        print(f"training would refuse this data: {visible(str(refusal))}", file=sys.stderr)
    return REFUSED if refusals else 0


def _spec(tokenizer: Any, options: dict[str, Any]) -> EncoderSpec:
    return encoder_spec(
        tokenizer,
        template_args=options["template_args"],
        template_date=options["template_date"],
        rewrites=options["rewrites"],
        drops=options["drops"],
    )


def _template_lines(spec: EncoderSpec) -> list[tuple[str, str]]:
    """(label, fields) of what the chat template prints, drops and refuses."""
    report = template_report(spec)
    return [
        (f"template {label}", ", ".join(fields))
        for label, outcome in (("prints", "printed"), ("drops", "dropped"), ("refuses", "refused"))
        if (fields := [f for f, o in report.items() if o == outcome])
    ]


def _stores(
    items: list[str], flag: str, spec: EncoderSpec, options: dict[str, Any]
) -> list[TokenStore]:
    """The tokenised data with any number of bad rows: they are what one wants to see."""
    tolerant = PrepareOptions(
        reading=Reading(
            options["data_format"],
            options["columns"],
            options["mask_history"],
            options["max_samples"],
            options["rows"],
        ),
        errors="skip",
        cache_dir=options["cache_dir"],
        workers=options["workers"],
        progress=True,
    )
    return [tokenised(source, spec, tolerant) for source in parse_sources(items, flag)]


def _build(
    args: argparse.Namespace,
    items: list[str],
    flag: str,
    tokenizer: Any,
    options: dict[str, Any],
    stores: list[TokenStore],
) -> tuple[ChatDataset | None, list[str]]:
    """The data set as training would build it, and why training would not."""
    refusals = []
    strict = PrepareOptions(errors=options["errors"], max_bad_rows=options["max_bad_rows"])
    for source, store in zip(parse_sources(items, flag), stores, strict=True):
        try:
            check_bad_rows(store, source.name, strict)
        except ValueError as error:
            refusals.append(str(error))
    if not any(map(len, stores)):
        return None, refusals
    vocab_size = vocab_size_of(args.tokenizer)
    settings = options | {"errors": "skip", "max_bad_rows": float("inf"), "packing": True}
    context = args.context_parallel_size
    settings |= dict(
        seq_length=args.seq_length,
        seed=args.seed,
        pad_multiple=2 * context if context > 1 else 1,
        shuffle=flag == "--train-data",
        flag=flag,
    )
    # As training would; without the model's vocabulary; without what is too long.
    tries = [settings | {"vocab_size": vocab_size}, settings, settings | {"overlong": "drop"}]
    for attempt in tries:
        try:
            return build_dataset(items, tokenizer, DatasetOptions(**attempt)), refusals
        except ValueError as error:
            if str(error) not in refusals:
                refusals.append(str(error))
    return None, refusals


def _show(args: argparse.Namespace, data: ChatDataset, tokenizer: Any, console: Console) -> None:
    shown: list[Shown] = []
    for row in range(len(data)):
        for number in data.plan.members(row).tolist():
            if len(shown) < max(args.show, 1):
                where = f"{data.conversations.where(number)} (row {row})"
                shown.append((where, runs(data.conversations[number], tokenizer)))
        if len(shown) >= max(args.show, 1):
            break
    if args.html:
        page = as_html(shown, "What trains: " + ", ".join(args.train_data or args.valid_data))
        Path(args.html).write_text(page, encoding="utf-8")
        console.print(Text(f"{len(shown)} conversations: {args.html}"), soft_wrap=True)
    else:
        print_shown(shown, console)
