"""`--help`: our flags in groups, with defaults, and those of Megatron's that every run sets;
`--help-megatron`: the thousand others.

Our own are read from help.json: their definitions import torch, which takes seconds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dft.storage import terminal

# [{title, description, rows: [{flags, metavar, nargs, help}], scoring}], of the flags themselves
# by `python tools/flags_page.py`; scoring: the group is of scoring runs alone.
TABLE = Path(__file__).with_name("help.json")

MEGATRON = "--help-megatron"
_USAGE = (
    "megatron-dft {command} [--nproc-per-node N] --hf-model DIR_OR_NAME --train-data PATH … "
    "[FLAGS]\n       torchrun TORCHRUN_FLAGS -m megatron_dft.{command} [FLAGS]   (several nodes)"
)
_LAUNCH: tuple[tuple[str, str, str], ...] = (
    ("--nproc-per-node", "N", "ranks on this machine, each with a GPU, or as many CPU processes as "
     "a rehearsal; gpu: one a GPU; default: 1"),
    ("--dry-run", "", "check all that the run would refuse, its data too, and start nothing; with "
     "--nnodes M as on M machines"),
)  # fmt: skip
# flag, value, what it does; the defaults are those of a run here.
_COMMON: tuple[tuple[str, str, str], ...] = (
    ("--seq-length", "TOKENS", "of a row; required"),
    ("--train-iters", "STEPS", "of the run; required, or --train-epochs"),
    ("--global-batch-size", "ROWS", "of a step, over all ranks; default: one a data-parallel rank"),
    ("--micro-batch-size", "ROWS", "of a rank at a time; default: 1"),
    ("--lr", "RATE", "the largest learning rate; required, the paper's is 5e-5"),
    ("--min-lr", "RATE", "at the end of the decay; default: 0"),
    ("--lr-decay-style", "NAME", "constant, linear, cosine, WSD …; default: linear"),
    ("--lr-warmup-fraction", "SHARE", "of the run in which the rate rises (or --lr-warmup-iters)"),
    ("--weight-decay", "X", "default: 0.01"),
    ("--clip-grad", "NORM", "default: 1.0"),
    ("--bf16", "", "train in bfloat16, with fp32 weights in the optimizer; default: fp32"),
    ("--tensor-model-parallel-size", "N", "ranks that share each layer; default: 1"),
    ("--pipeline-model-parallel-size", "N", "ranks that share the layers; default: 1"),
    ("--context-parallel-size", "N", "ranks that share a row; default: 1"),
    ("--expert-model-parallel-size", "N", "ranks that share the experts; default: 1"),
    ("--sequence-parallel", "", "norms and dropout are shared by tensor-parallel ranks too"),
    ("--use-distributed-optimizer", "", "shard the optimizer over data-parallel ranks"),
    ("--recompute-granularity", "full|selective", "recompute activations to save memory"),
    ("--save", "DIR", "checkpoints to go on from; with --save-interval"),
    ("--save-interval", "STEPS", "between checkpoints"),
    ("--load", "DIR", "go on from the newest checkpoint, where there is one"),
    ("--eval-interval", "STEPS", "between evaluations; default: a tenth of the run, at least 10"),
    ("--log-interval", "STEPS", "between progress lines; default: 1"),
    ("--tensorboard-dir", "DIR", "write TensorBoard's files there"),
    ("--seed", "N", "of the order of the data, and of dropout; default: 1234"),
)  # fmt: skip


class Defaults(argparse.HelpFormatter):
    """Appends the default of a flag whose help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        telling = action.default not in (None, False, argparse.SUPPRESS, 0, 0.0, [])
        if text and telling and "default" not in text.lower() and action.option_strings:
            return f"{text}; default: %(default)s"
        return text


def print_help(argv: Sequence[str], scoring: bool) -> bool:
    """Print the short help where the command line asks for it; whether it did."""
    if not {"-h", "--help"} & set(argv):
        return False
    command = "score" if scoring else "train"
    parser = argparse.ArgumentParser(
        prog=f"megatron-dft {command}",
        usage=_USAGE.format(command=command),
        add_help=False,
        epilog=f"Every flag of Megatron's works beside these: {MEGATRON} lists them.",
    )
    _add(parser.add_argument_group("launch"), _LAUNCH)
    _add(parser.add_argument_group("Megatron's flags that most runs set"), _COMMON)
    for group in json.loads(TABLE.read_text(encoding="utf-8")):
        if scoring or not group["scoring"]:
            _add_group(parser, group)
    terminal.say(parser.format_help().rstrip())
    return True


def _add(group: argparse._ArgumentGroup, rows: Sequence[tuple[str, str, str]]) -> None:
    for flag, value, text in rows:
        if value:
            group.add_argument(flag, metavar=value, help=text)
        else:
            group.add_argument(flag, action="store_true", help=text)


def _add_group(parser: argparse.ArgumentParser, group: dict[str, Any]) -> None:
    to = parser.add_argument_group(group["title"], group["description"])
    for row in group["rows"]:
        text = row["help"].replace("%", "%%")
        if row["nargs"] == 0:
            to.add_argument(*row["flags"], action="store_true", help=text)
        else:
            to.add_argument(*row["flags"], metavar=row["metavar"], nargs=row["nargs"], help=text)


def print_megatrons(groups: Sequence[argparse._ArgumentGroup]) -> None:
    """Print these groups of Megatron's parser."""
    formatter = Defaults("megatron-dft train")
    for group in groups:
        formatter.start_section(group.title)
        formatter.add_text(group.description)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
    terminal.say(formatter.format_help().rstrip())
