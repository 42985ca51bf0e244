"""Verifies samples in worker processes that are ended when they hang and replaced when they die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dft.rollout.sandbox import SandboxedCommand
from megatron_dft.rollout.verdict import Task, Verdict

KINDS = ("math", "exact", "regex", "python", "command")
_START_SECONDS = 300.0  # a user's module may import torch from a cold disk


@dataclass(frozen=True)
class VerifierSpec:
    """kind: one of KINDS; seconds: time limit of one sample; memory_mib: of a command."""

    kind: str
    marker: str | None = None
    pattern: str | None = None
    function: str | None = None
    command: str | None = None
    seconds: float = 10.0
    memory_mib: int = 2048

    def check(self) -> None:
        """Raises ValueError where a flag is missing or of another kind of verifier."""
        needs = {"regex": "pattern", "python": "function", "command": "command"}
        for kind, name in needs.items():
            given = getattr(self, name) is not None
            if given != (self.kind == kind):
                wants = "needs" if self.kind == kind else "does not read"
                raise ValueError(f"--verifier {self.kind} {wants} --{name}")
        if self.marker is not None and self.kind not in ("math", "exact"):
            raise ValueError(f"--verifier {self.kind} does not read --marker")
        if self.marker == "":
            raise ValueError("--marker: expected the text before the answer, got none")
        for flag, value in (("--time-limit", self.seconds), ("--memory-limit", self.memory_mib)):
            if not value > 0:
                raise ValueError(f"{flag}: expected more than 0, got {value}")


Verify = Callable[[Task], Verdict]
VerifyAll = Callable[[Sequence[Task], Callable[[int], None]], list[Verdict]]


class _Worker:
    """One worker process, started again when it is gone; used by one thread at a time."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec
        self._process: Any = None
        self._late = False

    def start(self) -> None:
        """Raises ValueError where the verifier cannot be loaded."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dft.rollout.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # math-verify logs every expression that it cannot parse.
            stderr=None if self._spec.kind == "python" else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        ready = self._exchange(asdict(self._spec), _START_SECONDS)
        if ready is None or ready["error"]:
            self.end()
            said = ready["error"] if ready else "its process ended before the first sample"
            raise ValueError(said)

    def verify(self, task: Task) -> Verdict:
        if self._process is None:
            self.start()
        verdict = self._exchange(asdict(task), self._spec.seconds)
        if verdict is not None:
            return Verdict(**verdict)
        self.end()
        if self._late:
            return Verdict(None, kind=f"verifier that took longer than {self._spec.seconds:g} s")
        return Verdict(None, kind="verifier whose process died")

    def _exchange(self, record: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The worker's reply; None where it died or, `_late`, was ended."""
        self._late = False
        timer = threading.Timer(seconds, self._interrupt)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(record) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()
            timer.join()  # it may just be ending the process, for this sample and not for the next
        return None if self._late or not line.endswith("\n") else json.loads(line)

    def _interrupt(self) -> None:
        self._late = True
        _kill_group(self._process.pid)

    def end(self) -> None:
        if self._process is not None:
            _kill_group(self._process.pid)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                stream.close()
            self._process = None


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@contextmanager
def _verifier(spec: VerifierSpec) -> Iterator[Verify]:
    """A function for any thread; each thread gets a worker of its own."""
    if spec.kind == "command":
        assert spec.command is not None
        yield SandboxedCommand(spec.command, spec.seconds, spec.memory_mib).verify
        return
    first = _Worker(spec)
    first.start()  # what cannot be loaded is told before the first sample
    idle, workers = [first], [first]
    lock, local = threading.Lock(), threading.local()

    def verify(task: Task) -> Verdict:
        if not hasattr(local, "worker"):
            with lock:
                local.worker = idle.pop() if idle else _Worker(spec)
                workers.append(local.worker)
        return local.worker.verify(task)

    try:
        yield verify
    finally:
        for worker in workers:
            worker.end()


@contextmanager
def verifying(spec: VerifierSpec, workers: int | None = None) -> Iterator[VerifyAll]:
    """A function of tasks to a verdict for each, in order; its worker processes stay for the next.

    workers: samples at a time, one a core by default. The function's second argument is called
    with how many are done. Raises ValueError where the verifier cannot be loaded.
    """
    spec.check()
    with _verifier(spec) as verify, ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:

        def verify_all(tasks: Sequence[Task], tell: Callable[[int], None]) -> list[Verdict]:
            verdicts = []
            for verdict in pool.map(verify, tasks):
                verdicts.append(verdict)
                tell(len(verdicts))
            return verdicts

        try:
            yield verify_all
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
