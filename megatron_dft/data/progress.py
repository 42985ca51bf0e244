"""How far a long preparation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from megatron_dft.storage import terminal

_LINE_EVERY_SECONDS = 15.0


@contextlib.contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (bytes done, rows done) since the last call; total is bytes."""
    if not shown:
        yield lambda done, rows: None
    elif terminal.error().isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        lines = _Lines(label, total)
        yield lines.advance
        lines.end()


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=terminal.error()), transient=True) as bar:
        task = bar.add_task(label, total=max(total, 1), rows=0)
        seen = 0

        def advance(done: int, rows: int) -> None:
            nonlocal seen
            seen += rows
            bar.update(task, advance=done, rows=seen)

        yield advance


class _Lines:
    """Plain lines, at most one every _LINE_EVERY_SECONDS and one at the end of a long task."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, max(total, 1)
        self._done = self._rows = 0
        self._begin = self._last = time.monotonic()

    def advance(self, done: int, rows: int) -> None:
        self._done += done
        self._rows += rows
        if time.monotonic() - self._last >= _LINE_EVERY_SECONDS:
            self._print(f"{100 * self._done // self._total}%")

    def end(self) -> None:
        if self._last > self._begin:
            self._print("done")

    def _print(self, state: str) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._begin
        terminal.warn(f"{self._label}: {state}, {self._rows:,} rows in {seconds:.0f} s")
