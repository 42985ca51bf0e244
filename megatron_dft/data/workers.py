"""Tokenising in parallel: small processes of our own that import neither torch nor transformers.

They are started as `python -m megatron_dft.data.workers` rather than by multiprocessing, which
would import the training program (and with it Megatron) into each of them, or fork a process that
already runs threads. Batches go to them over pipes and come back in the order of the file, so the
result does not depend on their number.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from megatron_dft.data.batches import RowBatch
from megatron_dft.data.bounds import HARD, SECONDS
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.reading import Reading
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.tokenize_rows import Result, tokenize_batch


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def tokenize_serially(
    batches: Iterable[RowBatch], spec: EncoderSpec, reading: Reading
) -> Generator[tuple[RowBatch, Result]]:
    """Each batch with its result, in this process."""
    encoder = ChatEncoder(spec)
    for batch in batches:
        yield batch, tokenize_batch(batch, encoder, reading)


def tokenize_in_parallel(
    batches: Iterable[RowBatch], spec: EncoderSpec, reading: Reading, workers: int
) -> Generator[tuple[RowBatch, Result]]:
    """Each batch with its result, in the order of `batches`, tokenised by `workers` processes.

    At most three batches a worker are held at a time, whatever the size of the file. Raises
    RuntimeError where a worker dies (killed for memory, for instance).
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []
    pending: deque[tuple[RowBatch, Future[Result]]] = deque()

    def run(batch: RowBatch) -> Result:
        worker = idle.get()
        try:
            return worker.ask(batch)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(workers) as threads:
        try:
            for _ in range(workers):
                started.append(_Worker(spec, reading))
                idle.put(started[-1])
            for batch in batches:
                pending.append((batch, threads.submit(run, batch)))
                if len(pending) >= 3 * workers:
                    batch, future = pending.popleft()
                    yield batch, future.result()
            while pending:
                batch, future = pending.popleft()
                yield batch, future.result()
        finally:
            for _, future in pending:
                future.cancel()
            for worker in started:
                worker.close()


class _Worker:
    """One process; `ask` is used by one thread at a time."""

    def __init__(self, spec: EncoderSpec, reading: Reading) -> None:
        environment = dict(
            os.environ, TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_dft.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send((spec, reading))

    def ask(self, batch: RowBatch) -> Result:
        self._send(batch)
        try:
            answer = pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except EOFError:
            raise self._death() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        # Ended first: a thread that still waits for its answer holds the pipe's lock until then.
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _send(self, value: Any) -> None:
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> Exception:
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return ValueError(
                "the chat template is given up: one operation of it takes more than "
                f"{HARD * SECONDS:g} s of CPU time; give another with --chat-template FILE"
            )
        why = f"signal {-status}" if status < 0 else f"exit status {status}"
        return RuntimeError(
            f"a tokenising process ended with {why}; its own messages are above; with signal 9 the "
            "machine ran out of memory: lower --data-workers"
        )


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    spec, reading = pickle.load(requests)
    encoder: ChatEncoder | None = None
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        try:
            encoder = encoder or ChatEncoder(spec)
            answer: Any = tokenize_batch(batch, encoder, reading)
        except ValueError as error:
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
