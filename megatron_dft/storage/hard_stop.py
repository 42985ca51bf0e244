"""The end of a process that reads a file which never comes back to Python.

The hash of a tuple of twice a tuple of twice … takes for ever in one operation of Python's own: no
handler runs and nothing can be raised, and a pickle of 200 bytes may ask for it.
"""

import contextlib
import faulthandler
import functools
import signal
import threading
from collections.abc import Iterator

_lock, _inside = threading.Lock(), 0


@contextlib.contextmanager
def hard_stop(seconds: float) -> Iterator[None]:
    """A block of at most so many seconds of this process's CPU time, all its threads together.

    Beyond it the process ends by SIGPROF, and standard error has the stack, which shows what was
    read. For what is far from such a bound in any honest case. The process has one such clock:
    where blocks of several threads overlap, each start sets it anew.
    """
    global _inside
    with _lock:
        _show_the_stack()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                signal.setitimer(signal.ITIMER_PROF, 0)


@functools.cache  # a load enters hundreds of blocks
def _show_the_stack() -> None:
    faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)
