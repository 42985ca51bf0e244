"""Run a function on N gloo ranks, each a process of its own, started in well under a second.

Importing torch, transformers and Megatron costs 15 s a process. A fork server that has imported
them once hands out ranks by fork; it has never run autograd, so the children may (forking pytest
itself would leave torch's autograd engine unusable in the child).
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dft.compat.loopback import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def _rank_main(fn, rank, world_size, args, kwargs, init, port, directory, env):
    # A group of its own: helpers that it starts (Megatron's checkpoint writers) end with it.
    os.setpgid(0, 0)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        TORCHDYNAMO_DISABLE="1",
        **env,
    )
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # The fork server's own streams may be buffered copies of a closed file.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    out = Path(directory) / f"rank{rank}.pkl"
    try:
        if init:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{directory}/store",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
        result = ("ok", fn(*args, **kwargs))
    except BaseException as error:  # the parent re-raises it with the rank's traceback
        result = ("error", (error, traceback.format_exc(), time.monotonic()))
    try:
        payload = pickle.dumps(result)
    except Exception:
        payload = pickle.dumps(("error", (RuntimeError(repr(result)), "", time.monotonic())))
    out.write_bytes(payload)
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter teardown: gloo's threads may still wait for a peer that has failed.
    os._exit(0)


def _outcome(path: Path, exitcode: int | None) -> Any:
    if path.exists():
        return pickle.loads(path.read_bytes())
    error = TimeoutError("rank still ran at the time-out, or died without a word")
    return "error", (error, f"exit code {exitcode}", float("inf"))


def _tail(directory: str, rank: int, lines: int = 40) -> str:
    text = (Path(directory) / f"rank{rank}.log").read_text(errors="replace").splitlines()
    return "\nlast output:\n" + "\n".join(text[-lines:]) if text else ""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    init: bool = True,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` ranks and return their results in rank order.

    `fn` is a module-level function of an importable test module; it, its arguments and its results
    are pickled. With `init` the default gloo group is up; without it only RANK, WORLD_SIZE,
    MASTER_ADDR … are set (Megatron's training loop brings up its own). What a rank prints is shown
    if it fails. The first rank's exception is raised here, its traceback in the message; a rank
    that is still running after `timeout` seconds fails the test.
    """
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        ranks = [
            _CONTEXT.Process(
                target=_rank_main,
                args=(fn, r, world_size, args, kwargs, init, port, directory, env or {}),
                # Not a daemon: Megatron's checkpoint writer forks helpers of its own.
                daemon=False,
            )
            for r in range(world_size)
        ]
        for p in ranks:
            p.start()
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Any] = {}
        while len(outcomes) < world_size and time.monotonic() < deadline:
            for r, p in enumerate(ranks):
                if r not in outcomes:
                    p.join(0.02)
                    if p.exitcode is not None:
                        outcomes[r] = _outcome(Path(directory) / f"rank{r}.pkl", p.exitcode)
            if any(kind == "error" for kind, _ in outcomes.values()):
                break
        for r, p in enumerate(ranks):
            p.join(1.0 if len(outcomes) < world_size else 0)
            p.kill()
            p.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
            outcomes.setdefault(r, _outcome(Path(directory) / f"rank{r}.pkl", p.exitcode))
        # Peers of a failed rank fail too, a moment later, when its connections close.
        failed = [(v[2], r, v) for r, (kind, v) in outcomes.items() if kind == "error"]
        if failed:
            _, r, (error, text, _) = min(failed, key=lambda f: f[:2])
            error.add_note(f"on rank {r} of {world_size}:\n{text}{_tail(directory, r)}")
            raise error
        return [outcomes[r][1] for r in range(world_size)]
