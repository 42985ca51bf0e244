"""All flags of ours, one group a subject; and a command line that argparse refuses, in one line."""

import argparse
import difflib
from typing import NoReturn

from megatron_dft.flags import (
    data,
    device,
    lens,
    model,
    objective,
    output,
    quantize,
    recovery,
    route,
    schedule,
    scores,
)


def define(parser: argparse.ArgumentParser, scoring: bool = False) -> None:
    """Add our flags, one group a subject; nothing is parsed or checked."""
    for subject in (model, schedule, device, objective, route, scores, lens):
        subject.add_arguments(parser)
    for subject in (output, quantize, recovery):
        subject.add_arguments(parser)
    data.add_arguments(parser.add_argument_group("data"))
    if scoring:
        scores.add_scoring_arguments(parser)


def refuse_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Let the parser raise ValueError where it would print a thousand lines of usage."""

    def error(message: str) -> NoReturn:
        raise ValueError(message + _meant(parser, message))

    parser.error = error  # type: ignore[method-assign]


def _meant(parser: argparse.ArgumentParser, message: str) -> str:
    """What an unknown flag may have meant."""
    if not message.startswith("unrecognized arguments:"):
        return ""
    known = list(parser._option_string_actions)
    words = [word.split("=")[0] for word in message.split() if word.startswith("--")]
    found = [difflib.get_close_matches(word, known, n=1) for word in words]
    meant = [names[0] for names in found if names]
    return f"; did you mean {', '.join(meant)}?" if meant else "; --help lists the flags"
