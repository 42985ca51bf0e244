"""Processes of the GPU suite: each with a time limit, each ended with all that it has started."""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

TIME_IS_OUT = -1
_live: set[int] = set()
_lock = threading.Lock()


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def end_all() -> None:
    """End every process that still runs; what waits for one goes on."""
    with _lock:
        for group in _live:
            _end(group)


def run(words: list[str], log: Path, limit: float, cwd: Path, env: dict[str, str]) -> int:
    """The command's exit status, or TIME_IS_OUT; its output in `log`. limit: seconds."""
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=env, start_new_session=True
        )
    with _lock:
        _live.add(process.pid)
    try:
        return process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
        return TIME_IS_OUT
    finally:
        with _lock:
            _live.discard(process.pid)
        _end(process.pid)  # what it has started: torchrun's ranks, a writer of checkpoints
        process.wait()
