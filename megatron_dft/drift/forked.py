"""Tasks in forked processes, admitted while the memory that they hold together fits a budget.

Processes, not threads: the statistics are many short kernels, and handing the interpreter's lock
to and fro between them cost more than the second core brought.
"""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

_task: Callable | None = None  # in a worker: what it runs, inherited by the fork


def _begin(task: Callable) -> None:
    global _task
    _task = task
    # One kernel thread a worker, and none of the parent's: a forked OpenMP pool has no threads.
    torch.set_num_threads(1)


def _run(argument: object) -> object:
    assert _task is not None
    return _task(argument)


def run[T, R](
    task: Callable[[T], R], sizes: Sequence[tuple[T, int]], budget: int, workers: int
) -> Iterator[R]:
    """`task(argument)` for every (argument, bytes held) of `sizes`, as they finish.

    They start in the order given, but for those that wait until `budget` has room; work larger
    than the budget runs alone. Arguments and results are pickled. One worker means this process.
    An exception of `task` ends the rest; BrokenProcessPool if a worker is killed.
    """
    if workers == 1:
        yield from (task(argument) for argument, _ in sizes)
        return
    waiting, held = list(sizes), 0
    running: dict[Future[R], int] = {}
    gc.freeze()  # a collection would write to, and so copy, every page that the workers share
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(task,)
    )
    try:
        while waiting or running:
            # One more than there are workers, so that none idles while a result is taken in.
            while waiting and len(running) <= workers:
                fits = (i for i, (_, size) in enumerate(waiting) if held + size <= budget)
                index = next(fits, None if running else 0)
                if index is None:
                    break
                argument, size = waiting.pop(index)
                running[pool.submit(_run, argument)] = size  # type: ignore[arg-type]
                held += size
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                held -= running.pop(future)
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        gc.unfreeze()
