"""Reading, checking and writing at the same time.

`WriteBehind` also keeps what is written out of memory. Left to itself the kernel keeps gigabytes of
a new file as dirty pages: that evicts what others have cached, ends in one long flush, and on a
virtual machine each fresh page may first have to be given by its host (200 MB/s where recycled
pages reach 1,000, measured with a file of 1 GiB).
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

_WINDOW = 64 * 2**20


class WriteBehind:
    """Flushes the file `fd` every 64 MiB, one window behind; used by one thread."""

    def __init__(self, fd: int) -> None:
        self._fd, self._written = fd, 0
        self._thread = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None

    def wrote(self, nbytes: int) -> None:
        """`nbytes` more are written. OSError where an earlier window did not reach the disk."""
        self._written += nbytes
        if self._written < _WINDOW:
            return
        self._written = 0
        self._wait()
        self._flush = self._thread.submit(self._settle)

    def _wait(self) -> None:
        if self._flush is not None:
            flush, self._flush = self._flush, None
            flush.result()

    def _settle(self) -> None:
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Everything reaches the disk; `fd` stays open."""
        self._wait()
        self._settle()
        self._thread.shutdown()

    def abandon(self) -> None:
        """Stop; what is written may be lost."""
        self._thread.shutdown()


def ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The items, each prepared in a thread while the caller uses the one before it."""
    end = object()
    # One kernel thread there: a second team of them would fight with the caller's for the cores.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
