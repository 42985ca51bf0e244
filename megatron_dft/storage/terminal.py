"""What a person reads of a run, and the file that takes the rest.

Megatron prints a thousand lines before the first step, and every library warns once a rank. In a
program of ours file descriptors 1 and 2 lead to a log file, whoever writes there: Megatron,
Python's warnings, C code. What this package says goes through `say` and `warn`, to the terminal and
to that file. Nothing is diverted where the training is called from another program.
"""

import os
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path
from socket import gethostname
from typing import IO, TextIO


class _Diverted:
    """The terminal's two streams while descriptors 1 and 2 lead elsewhere."""

    out: TextIO | None = None
    error: TextIO | None = None
    held: IO[bytes] | None = None  # what was written before the log had a name
    log: Path | None = None
    heading: str | None = None


def out() -> TextIO:
    """Where `say` writes: the terminal's standard output."""
    return _Diverted.out or sys.stdout


def error() -> TextIO:
    """Where `warn` writes: the terminal's standard error."""
    return _Diverted.error or sys.stderr


def log() -> Path | None:
    """The file that takes the rest; None where nothing is diverted, or it has no name yet."""
    return _Diverted.log


def head(line: str) -> None:
    """`line` is to come before the next one; that of a failure comes without it."""
    _Diverted.heading = line


def say(line: str) -> None:
    """A line on the terminal's standard output, and in the log."""
    _say_heading()
    _write(out(), line)


def say_once(line: str) -> None:
    """`say`, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        say(line)


def warn(line: str) -> None:
    """A line on the terminal's standard error, and in the log; where there are several hosts, with
    the name of this one."""
    _say_heading()
    _write(error(), _with_host(line))


def fail(reason: str) -> None:
    """`warn`, of what ends the run."""
    _write(error(), _with_host(f"error: {reason}"))


def _say_heading() -> None:
    heading, _Diverted.heading = _Diverted.heading, None
    if heading is not None:
        _write(out(), heading)


def _with_host(line: str) -> str:
    hosts = os.environ.get("WORLD_SIZE", "1") != os.environ.get(
        "LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")
    )
    return f"{gethostname()}: {line}" if hosts else line


def visible(text: str) -> str:
    """Control characters as escapes: what stands in files must not steer the terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else _escape(c)
        for c in text
    )


def _escape(char: str) -> str:
    # Joins the parts of an emoji and orders mixed scripts; it moves nothing on the screen.
    if char in "\u200c\u200d":
        return char
    return char.encode("unicode_escape").decode("ascii")


def _write(stream: TextIO, line: str) -> None:
    line = visible(line)
    # One write a line: those of several ranks come to the same place.
    stream.write(f"{line}\n")
    stream.flush()
    if _Diverted.out is not None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def divert() -> None:
    """From now on descriptors 1 and 2 lead to a file without a name; `settle` gives it one."""
    _flush()
    _Diverted.out = open(os.dup(1), "w", encoding="utf-8", errors="replace")
    _Diverted.error = open(os.dup(2), "w", encoding="utf-8", errors="replace")
    _Diverted.held = tempfile.TemporaryFile()
    _lead_to(_Diverted.held.fileno())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]


def settle(path: Path | None, first: bool) -> None:
    """The log goes to `path`, behind what stands there; None: back to the terminal.

    first: whether this rank's lines from before are kept; those of the others say the same.

    Raises OSError where it cannot be written. Does nothing where nothing is diverted.
    """
    if _Diverted.held is None:
        return
    if path is None:
        undo(show=first)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a directory where everybody writes, a link of this name may lead anywhere.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    if first:
        _copy_held(file)
    _lead_to(file)
    os.close(file)
    _Diverted.held.close()
    _Diverted.held, _Diverted.log = None, path


def undo(show: bool) -> None:
    """Descriptors 1 and 2 lead to the terminal again; show: what was held is printed there."""
    if _Diverted.out is None or _Diverted.error is None:
        return
    if show and _Diverted.held is not None:
        _copy_held(_Diverted.error.fileno())
    _flush()
    os.dup2(_Diverted.out.fileno(), 1)
    os.dup2(_Diverted.error.fileno(), 2)
    _Diverted.out.close()
    _Diverted.error.close()
    _Diverted.out = _Diverted.error = _Diverted.held = _Diverted.log = None


def _copy_held(file: int) -> None:
    assert _Diverted.held is not None
    _flush()
    _Diverted.held.seek(0)
    with open(os.dup(file), "ab") as log:
        shutil.copyfileobj(_Diverted.held, log)


def _lead_to(file: int) -> None:
    _flush()
    os.dup2(file, 1)
    os.dup2(file, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
