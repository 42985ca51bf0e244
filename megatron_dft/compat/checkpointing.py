"""What Megatron's checkpoint code gets wrong for a job under a scheduler."""

import queue
import sys
from typing import Any

from megatron_dft.compat.hooks import wrap


def checkpoint_exists(directory: str | None) -> bool:
    """Whether Megatron would find a checkpoint to load there."""
    from megatron.training.checkpointing import checkpoint_exists as exists

    return directory is not None and exists(directory)


def fail_on_silent_exits() -> None:
    """Megatron's checkpoint code calls sys.exit() with status 0 where loading failed.

    A scheduler would take that for success. Inside that module a bare exit becomes status 1.
    """

    class _Sys:
        def __getattr__(self, name):
            return getattr(sys, name)

        @staticmethod
        def exit(status=None):
            sys.exit(status or 1)

    def make(original):
        return _Sys()

    wrap("megatron.training.checkpointing:sys", make)


def collect_write_results_here() -> None:
    """For runs without --async-save: a save's results stay in the process whose threads wrote it.

    Megatron passes them through a helper process, which is needed only where another process
    writes. Each rank's helper imports torch and Megatron again at the first save: 4 s of a core
    and half a gigabyte, kept to the end of the run.
    """
    results: queue.Queue[Any] = queue.Queue()

    def make(original):
        def get_write_results_queue(*args, **kwargs):
            return results

        return get_write_results_queue

    module = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    wrap(f"{module}:get_write_results_queue", make)
