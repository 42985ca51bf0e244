"""Bounds on the time and the memory of a chat template: a program out of somebody's checkpoint.

Jinja's sandbox bounds neither: nested loops run for hours, and `'a' * n` takes what n asks for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS = 20.0  # of this process's own CPU time: another program's load does not count
# Times SECONDS after which the process ends: one operation of Python's own that never comes back,
# such as the hash of a tuple of twice a tuple of twice …, lets no handler run.
HARD = 3
MEMORY = 2 << 30  # bytes beyond what the process has
# The clock is not set anew for each block of a batch: it rings so often within SECONDS, and a block
# is given up when it has heard one ring more.
_RINGS = 4


class TimeUp(Exception):
    """The bound of time; the message is one line."""


class Bounded:
    """A with block, entered any number of times, of at most SECONDS of CPU time, a quarter more at
    the most, and MEMORY bytes.

    Raises TimeUp and MemoryError inside of the block. The time is bounded on a process's main
    thread alone: a signal reaches no other. Where Python cannot raise, the process ends by SIGPROF
    after HARD times as long, and standard error shows that it was a template.
    """

    def __init__(self) -> None:
        self._in_batch = self._in_block = self._times = self._is_set = False
        self._rings = 0

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Blocks inside cost no system call: the kernel's limits are set once for all of them.

        MEMORY then counts from the start of the batch, and MemoryError may come between blocks.
        """
        self._set()
        self._in_batch = True
        try:
            yield
        finally:
            self._in_batch = False
            self._lift()

    def __enter__(self) -> None:
        if not self._in_batch:
            self._set()
        self._rings = 0
        self._in_block = True

    def __exit__(self, *_: object) -> None:
        self._in_block = False
        if not self._in_batch:
            self._lift()

    def _set(self) -> None:
        self._before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = _data_bytes() + MEMORY
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (most if soft == resource.RLIM_INFINITY else min(most, soft), hard),
        )
        self._times = threading.current_thread() is threading.main_thread()
        self._is_set = True
        if self._times:
            interval = SECONDS / _RINGS
            signal.signal(signal.SIGVTALRM, self._ring)
            faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)
            signal.setitimer(signal.ITIMER_VIRTUAL, interval, interval)
            signal.setitimer(signal.ITIMER_PROF, HARD * SECONDS)

    def _lift(self) -> None:
        self._is_set = False  # first: a ring may be under way
        if self._times:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, self._before)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._is_set:  # whoever hears it is not stuck
            signal.setitimer(signal.ITIMER_PROF, HARD * SECONDS)
        self._rings += 1
        if self._in_block and self._rings > _RINGS:
            raise TimeUp(f"it takes more than {SECONDS:g} s of CPU time")


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
