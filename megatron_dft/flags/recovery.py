"""Flags of stopping, checkpoint safety and resuming."""

import argparse
from typing import Any

CHANGES = ("loss", "model", "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to Megatron's parser."""
    group = parser.add_argument_group("recovery", "Stopping, checkpoints and resuming")
    group.add_argument(
        "--stop-file",
        metavar="FILE",
        help="stop with a checkpoint after the step in which this file appears; SIGTERM or SIGUSR1 "
        "to any rank does the same",
    )
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="keep the newest N checkpoints of --save; default: all",
    )
    group.add_argument(
        "--strict-resume",
        action="store_true",
        help="refuse to go on where the newest checkpoint is damaged; default: name it and take "
        "the one before",
    )
    group.add_argument(
        "--allow-change",
        nargs="+",
        choices=CHANGES,
        default=[],
        metavar="WHAT",
        help=f"resume although this differs from the checkpoint's run: {', '.join(CHANGES)}",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="print all stacks and exit after this long without a finished step, save or set-up; "
        "0 switches it off; default: 1800",
    )


def check(args: Any) -> None:
    """Refuse contradictions.

    Raises:
        ValueError: one line naming the flag, what was expected, what came, and the remedy.
    """
    if args.keep_last is not None:
        if args.keep_last < 1:
            raise ValueError(
                f"--keep-last: expected at least 1 checkpoint, got {args.keep_last}; leave the "
                "flag out to keep all"
            )
        if args.save is None:
            raise ValueError("--keep-last: expected --save DIR beside it, got none")
        if args.save_retain_interval is not None:
            raise ValueError(
                "--save-retain-interval: deletes checkpoints too; drop it or --keep-last"
            )
        if args.async_save:
            raise ValueError(
                "--async-save: a checkpoint may still be unfinished when --keep-last deletes the "
                "one before; drop one of the two"
            )
    if args.hang_timeout < 0:
        raise ValueError(
            f"--hang-timeout: expected seconds, 0 or more, got {args.hang_timeout:g}; 0 switches "
            "it off"
        )
    if args.save is not None and args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--ckpt-format: expected torch_dist, the one that is committed whole, got "
            f"{args.ckpt_format}; leave the flag out"
        )
