"""A step whose loading fails, although its files are as they were written, gives way to the one
before.

What fails on one rank counts for all: they agree after each attempt. Running out of memory says
nothing about the checkpoint, and a step that was asked for by name is not exchanged for another.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery import resume
from megatron_dft.recovery.resume import ResumeError

# Megatron asserts that they are untouched when it loads.
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


class Run(Protocol):
    """What this file needs of supervise.py."""

    args: Any
    chosen: int | None

    def before_model(self, failed: dict[int, str] | None = None) -> None: ...


def _agree(error: BaseException | None) -> str | None:
    """The first rank's words that failed, None where none did. Collective."""
    words = None
    if error is not None:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        words = f"{kind}{' '.join(str(error).split())}"[:600]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, words)
    return next((one for one in every if one is not None), None)


def install(run: Run) -> None:
    """Hook into Megatron's loading."""

    def loading(original):
        def load_checkpoint(*positional, **named):
            args, failed = run.args, dict[int, str]()
            before = {name: getattr(args, name) for name in _COUNTERS if hasattr(args, name)}
            if run.chosen is None or run.chosen < 0 or args.ckpt_step is not None:
                return original(*positional, **named)
            while True:
                error: BaseException | None = None
                try:
                    found = original(*positional, **named)
                except (MemoryError, torch.OutOfMemoryError, ResumeError):
                    raise
                # CheckpointException is a BaseException; Megatron leaves by sys.exit.
                except (Exception, CheckpointException, SystemExit) as caught:
                    error = caught
                reason = _agree(error)
                if reason is None:
                    return found
                failed[run.chosen] = reason
                vars(args).update(before)
                try:
                    run.before_model(failed)
                except ResumeError:  # none is left; what was wrong may be the flags
                    resume.mend_tracker(Path(args.load), max(failed))
                    raise

        return load_checkpoint

    wrap("megatron.training.training:load_checkpoint", loading)
