"""Bounds on the time and the memory of a chat template: a program out of somebody's checkpoint.

Jinja's sandbox bounds neither: nested loops run for hours, and `'a' * n` takes what n asks for.
"""

from __future__ import annotations

import faulthandler
import resource
import signal
import threading
from types import FrameType

SECONDS = 20.0  # of this process's own CPU time: another program's load does not count
# Times SECONDS after which the process ends: one operation of Python's own that never comes back,
# such as the hash of a tuple of twice a tuple of twice …, lets no handler run.
HARD = 3
MEMORY = 2 << 30  # bytes beyond what the process has
# Reading what the process has takes longer than a short row's rendering: once in so many blocks.
_BLOCKS_A_READING = 64


class TimeUp(Exception):
    """The bound of time; the message is one line."""


class Bounded:
    """A with block, entered any number of times, of at most SECONDS of CPU time and MEMORY bytes.

    Raises TimeUp and MemoryError inside of the block. The time is bounded on a process's main
    thread alone: a signal reaches no other. Where Python cannot raise, the process ends by SIGPROF
    after HARD times as long, and standard error shows that it was a template.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._times = threading.current_thread() is threading.main_thread()
        if self._times:
            signal.signal(signal.SIGVTALRM, _ring)
            faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)

    def __enter__(self) -> None:
        if self._entered % _BLOCKS_A_READING == 0:
            self._before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
            most = _data_bytes() + MEMORY
            self._within = (most if soft == resource.RLIM_INFINITY else min(most, soft), hard)
        self._entered += 1
        resource.setrlimit(resource.RLIMIT_DATA, self._within)
        if self._times:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            signal.setitimer(signal.ITIMER_PROF, HARD * SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._times:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _ring(number: int, frame: FrameType | None) -> None:
    raise TimeUp(f"it takes more than {SECONDS:g} s of CPU time")


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
