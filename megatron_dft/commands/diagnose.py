"""`megatron-dft diagnose MODEL DATA`: before training, is DFT the right loss for this data?"""

import argparse
import sys
from pathlib import Path

from megatron_dft.data import scored_text
from megatron_dft.data.end_tokens import probe_end_tokens
from megatron_dft.data.reading import Reading, parse_columns
from megatron_dft.data.tokenizer import encoder_spec
from megatron_dft.drift import diagnosis_report
from megatron_dft.drift.diagnosis import diagnose
from megatron_dft.drift.scoring import load_model, score, windows
from megatron_dft.flags.data import add_layout

SUMMARY = "target probabilities of the base on the training data, and the loss to choose"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the base model, a Hugging Face directory")
    parser.add_argument("data", nargs="+", help="training conversations, as for --train-data")
    parser.add_argument(
        "--out", type=Path, default=Path("diagnosis"), help="report directory (%(default)s)"
    )
    add_layout(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=50_000,
        help="supervised tokens to score, from conversations drawn at random (%(default)s)",
    )
    parser.add_argument(
        "--window", type=int, default=1024, help="tokens that the model sees at once (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument("--chat-template", help="Jinja file in place of the tokenizer's template")


def run(args: argparse.Namespace) -> int:
    for flag, value, least in (("--max-tokens", args.max_tokens, 1), ("--window", args.window, 2)):
        if value < least:
            raise ValueError(f"{flag}: expected {least} or more, got {value}")
    tokenizer = scored_text.tokenizer_of(args.model, args.chat_template)
    reading = Reading(args.data_format, parse_columns(args.columns))
    rows = scored_text.conversations(args.data, tokenizer, "DATA", reading)
    total = len(rows)
    rows, cut = scored_text.limit(rows, args.max_tokens)
    model = load_model(args.model, args.device)
    print(f"diagnose: {len(rows):,} conversations of {total:,}", file=sys.stderr)
    scores = list(score(model, windows(rows, args.window)))
    # Verbatim text ends with the tokenizer's own, chats with the template's.
    ends = [*probe_end_tokens(encoder_spec(tokenizer))]
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    special = frozenset(tokenizer.all_special_ids)
    result = diagnose(scores, lambda i: tokenizer.decode([i]), special, ends)
    notes = []
    if cut:
        notes.append(f"From {len(rows):,} of {total:,} conversations, drawn at random.")
    result |= {"model": str(args.model), "data": " ".join(args.data), "notes": notes}
    diagnosis_report.write(args.out, result)
    print(f"--loss {result['recommendation']['loss']}: {result['recommendation']['reason']}")
    if "ends" in result["recommendation"]:
        print(result["recommendation"]["ends"])
    print(f"report: {args.out / 'diagnosis.html'}")
    return 0
