"""Megatron's flags for a checkpoint, ready to paste into a stock Megatron-LM command."""

import argparse
import shlex
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from megatron_dft.hf.config import TRAINING_DEFAULTS, megatron_args
from megatron_dft.hf.source import HFCheckpoint


def megatron_parser() -> argparse.ArgumentParser:
    """Stock Megatron's own parser."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return parser


def megatron_flags(checkpoint: HFCheckpoint) -> list[str]:
    """The flags that give Megatron this architecture, one a string, in the order of
    `megatron_args`.

    Values that are the parser's defaults are left out, dropout excepted (its default is not 0).
    """
    parser = megatron_parser()
    defaults = vars(parser.parse_args([]))
    flags = []
    for name, value in megatron_args(checkpoint).items():
        if value == defaults[name] or (name in TRAINING_DEFAULTS and "dropout" not in name):
            if name != "max_position_embeddings":
                continue
        flags.append(_flag(parser, name, value))
    return flags


def _flag(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    actions = [a for a in parser._actions if a.dest == name]
    for action in actions:
        option = action.option_strings[0]
        if action.nargs == 0:
            if action.const == value:
                return option
        elif isinstance(value, tuple):
            return f"{option} {','.join(map(str, value))}"
        elif isinstance(value, list):
            # Megatron's parser of layer patterns takes no blanks.
            return f"{option} {shlex.quote(str(value).replace(' ', ''))}"
        else:
            if action.type is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # config.json writes the rotary base as 1000000.0
            return f"{option} {value}"
    raise AssertionError(f"no flag of Megatron's sets {name} to {value!r}")
