"""Where Megatron's own log goes, and what a program of ours leaves on the terminal when it dies."""

import os
import secrets
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_dft.recovery.exit_codes import FORCED
from megatron_dft.storage import terminal

# The launcher gives the ranks of a run one name that nobody else could have made before.
NAME = "MEGATRON_DFT_RUN"
TO_TERMINAL = "-"


def path_of(args: Any, scoring: bool = False) -> Path | None:
    """The log of this node's ranks; None: the terminal, by --megatron-log -."""
    node = int(os.environ["RANK"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    name = f"megatron-node{node}.log" if node else "megatron.log"
    if args.megatron_log is not None:
        chosen = Path(args.megatron_log)
        if args.megatron_log == TO_TERMINAL:
            return None
        return chosen.with_name(f"{chosen.stem}-node{node}{chosen.suffix}") if node else chosen
    beside = args.dft_reference_scores if scoring else args.save_hf
    if args.save is not None:
        return Path(args.save) / name
    if beside is not None:  # an export replaces its directory as a whole
        return Path(f"{beside.rstrip('/')}-{name}")
    if NAME not in os.environ and os.environ["LOCAL_RANK"] != "0":
        return Path(os.devnull)  # without our launcher: the first rank's alone is kept
    run = os.environ.get(NAME) or secrets.token_hex(8)
    return Path(tempfile.gettempdir()) / f"megatron-dft-{run}-{name}"


def begin(args: Any, scoring: bool) -> None:
    """Give the log its name, on every rank, when nothing can be refused any more.

    Raises ValueError where it cannot be written.
    """
    path = path_of(args, scoring)
    try:
        terminal.settle(path, first=os.environ["LOCAL_RANK"] == "0")
    except OSError as error:
        flag = "--megatron-log" if args.megatron_log is not None else "--save"
        raise ValueError(
            f"{flag}: expected a file to write Megatron's log to, got {path}: {error.strerror}; "
            "choose another, or - for the terminal"
        ) from None
    if terminal.log() is not None and os.environ["RANK"] == "0":
        kept = "" if args.save or args.save_hf or args.megatron_log or scoring else (
            " (a temporary file: nothing is saved)"
        )  # fmt: skip
        terminal.say(f"> Megatron's own log: {terminal.log()}{kept}")


def run_program(main: Callable[[], int]) -> NoReturn:
    """End the process with `main`'s status; an exception's traceback goes to the log.

    The terminal gets it where there is no log yet.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":
            terminal.warn("interrupted: what came after the last checkpoint is not saved")
        status = FORCED
    except Exception:
        traceback.print_exc()
        if terminal.log() is None:
            terminal.undo(show=True)
        else:
            terminal.warn(f"the traceback is in {terminal.log()}")
        status = 1
    sys.exit(status)
