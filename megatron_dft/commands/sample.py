"""`megatron-dft sample`: prompts → n samples each from a checkpoint or a server."""

import argparse
import json
import sys
from pathlib import Path

from megatron_dft.commands import rollout_flags as flags
from megatron_dft.rollout.prompts import Skips, read_prompts
from megatron_dft.rollout.sampler import Outcome, draw_samples
from megatron_dft.storage.files import write_whole
from megatron_dft.storage.terminal import visible

SUMMARY = "n samples of a model to each prompt; a killed run goes on where it stopped"
INCOMPLETE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="Hugging Face directory or name; the server's name for it"
    )
    parser.add_argument(
        "--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines or Parquet"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the samples"
    )
    flags.add_prompt_arguments(parser)
    flags.add_decoding_arguments(parser, samples=4)
    flags.add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Status 1 where samples are missing: the same command draws them."""
    how, part, shape = flags.decoding(args), flags.part(args), flags.shape(args)
    prompts, skips = read_prompts(args.prompts, shape, "--prompts")
    backend = flags.backend(args, args.model, how)
    outcome = draw_samples(
        args.out,
        prompts,
        args.samples,
        how,
        backend,
        settings=flags.rendering_settings(args),
        part=part,
    )
    print(f"{args.out}: {outcome.line()}")
    tell_left_out(outcome, skips)
    write_whole(
        args.out / f"summary.{part[0]}-of-{part[1]}.json",
        json.dumps(
            {
                "samples": outcome.samples,
                "kept": outcome.kept,
                "missing": outcome.missing,
                "tokens": outcome.tokens,
                "seconds": outcome.seconds,
                "skipped": {**skips.record(), **outcome.skips.record()},
                "faults": outcome.faults.record(),
            },
            indent=1,
        )
        + "\n",
    )
    return INCOMPLETE if outcome.missing else 0


def tell_left_out(outcome: Outcome, skips: Skips) -> None:
    for what, found in (
        ("skipped rows", skips),
        ("skipped prompts", outcome.skips),
        ("no answer", outcome.faults),
    ):
        if found.counts:
            print(visible(f"{what}: {found}"), file=sys.stderr)
    if outcome.missing:
        print(
            f"{outcome.missing:,} samples are missing; the same command draws them",
            file=sys.stderr,
        )
