"""A run that makes no progress shows where each rank stands, and ends.

A lost peer leaves the others inside a collective, where NCCL's own time-out comes late and gloo's
may not come at all. A thread of each rank looks at the time of the last progress (a step, a save,
the end of set-up); past the limit it prints the stacks of all threads and exits. Where even that
thread cannot run (something holds the interpreter), a timer inside the interpreter does the same
a minute later.
"""

import faulthandler
import os
import threading
import time

from megatron_dft.recovery import exit_codes, status
from megatron_dft.storage import terminal

_SPARE = 60.0  # seconds


class Watchdog:
    """Armed for as long as it lives between `start` and `stop`; `limit` in seconds."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._section, self._since = "set-up", time.monotonic()
        self._done = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        self.progress("set-up")
        threading.Thread(target=self._watch, name="hang watchdog", daemon=True).start()

    def progress(self, section: str) -> None:
        """Something has ended, and `section` begins."""
        self._section, self._since = section, time.monotonic()
        faulthandler.dump_traceback_later(self.limit + _SPARE, exit=True)

    def stop(self) -> None:
        """No more watching."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            left = self._since + self.limit - time.monotonic()
            if left <= 0:
                break
            if self._done.wait(left):
                return
        rank = os.environ.get("RANK", "0")
        terminal.fail(
            f"rank {rank}: no progress for {self.limit:g} s in "
            f"{self._section} (--hang-timeout); the stacks of this rank follow, then it exits"
        )
        faulthandler.dump_traceback(all_threads=True)
        status.record("hang", self._section)
        os._exit(exit_codes.HANG)
