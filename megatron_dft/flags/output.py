"""Flags of what a run leaves behind: Hugging Face exports, checkpoints, the progress line."""

import argparse
import os
import re
from pathlib import Path

from megatron_dft.hf import companions
from megatron_dft.hf.portable import is_hub_name
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.dtypes import WORDS, dtype_word

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; nothing is parsed or checked."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--save-hf", metavar="DIR", help="write a Hugging Face checkpoint here at the end"
    )
    group.add_argument(
        "--save-hf-interval",
        type=int,
        metavar="STEPS",
        help="also write DIR-step-N every so many steps",
    )
    group.add_argument(
        "--save-hf-dtype",
        type=dtype_word,
        choices=tuple(WORDS),
        help="dtype of the written weights; default: that of the base checkpoint",
    )
    group.add_argument(
        "--hf-base-model",
        metavar="ORG/NAME",
        help="hub name of the base for the model card, where --hf-model is a directory",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="let --save-hf replace an existing directory"
    )
    group.add_argument(
        "--progress",
        choices=("auto", "rich", "plain", "off"),
        default="auto",
        help="a line a step on the terminal; auto is rich on a terminal, else plain; off leaves "
        "the steps to Megatron's log",
    )
    group.add_argument(
        "--megatron-log",
        metavar="FILE",
        help="where everything goes that is not ours: Megatron's arguments and lines, and warnings "
        "of libraries; - is the terminal. Default: megatron.log in --save or beside --save-hf, a "
        "temporary file where nothing is saved",
    )


def check(args: argparse.Namespace, checkpoint: HFCheckpoint | None) -> None:
    """Raise one ValueError where something would be lost, overwritten or never written."""
    if args.save is not None and args.save_interval is None:
        raise ValueError(
            f"--save {args.save}: expected --save-interval STEPS beside it, got none; "
            "a number beyond the last step saves at the end alone"
        )
    _check_file_system(args)
    check_base_model(args.hf_base_model)
    if args.save_hf is None:
        if args.hf_base_model is not None:
            raise ValueError(
                "--hf-base-model: is written into the card of --save-hf DIR, got no such export; "
                "give it or drop the flag"
            )
        if args.save_hf_interval is not None:
            raise ValueError(
                "--save-hf-interval: expected --save-hf DIR beside it, got none; give it or drop "
                "the flag"
            )
        return
    if args.save_hf_interval is not None and args.save_hf_interval < 1:
        raise ValueError(
            f"--save-hf-interval: expected at least 1 step, got {args.save_hf_interval}; leave it "
            "out to export at the end alone"
        )
    target = Path(args.save_hf)
    if checkpoint is not None and target.resolve() == checkpoint.path.resolve():
        raise ValueError(f"--save-hf: {target} is the base model itself; choose another directory")
    if checkpoint is not None:
        companions.check(checkpoint)
    refuse_filled(args)


def _check_file_system(args: argparse.Namespace) -> None:
    """A checkpoint is committed by a rename, and each of its files is read back and hashed."""
    if args.enable_msc:
        raise ValueError(
            "--enable-msc: expected checkpoints in a file system, where a rename commits them, got "
            "the flag of object stores, which have none; drop it and copy finished steps"
        )
    for name in ("save", "load", "save_hf"):
        place = getattr(args, name)
        if place is not None and _URL.match(place):
            raise ValueError(
                f"--{name.replace('_', '-')}: expected a directory, got {place}; save to one and "
                "copy finished steps"
            )


def check_base_model(name: str | None) -> None:
    """Raise ValueError for what cannot be a model's name on the hub."""
    if name is not None and not is_hub_name(name):
        raise ValueError(
            f"--hf-base-model: expected ORG/NAME as on the hub, such as Qwen/Qwen2.5-Math-7B, got "
            f"{name!r}"
        )


def follow_links(args: argparse.Namespace) -> None:
    """Follow a link given for --save, --load or --save-hf, once; changes `args`.

    What is written, renamed and deleted stands where it leads, also where that does not exist yet.
    """
    for name in ("save", "load", "save_hf"):
        given = getattr(args, name)
        if given is not None and os.path.islink(given.rstrip("/")):
            setattr(args, name, os.path.realpath(given))


def refuse_filled(args: argparse.Namespace) -> None:
    """Raise ValueError where --save-hf holds something that may not be replaced."""
    target = Path(args.save_hf)
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise ValueError(
            f"--save-hf: {target} exists and is not empty; choose another directory or add "
            "--overwrite"
        )
