"""Start the ranks of a run on this machine, pass signals on, and end all of them when one dies.

What torchrun does for one node, without its words: the ranks' own lines are the only ones, and the
exit status is theirs (recovery/exit_codes.py). Rank 0 holds the store. Under another launcher
(RANK is set) the process becomes that rank.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_dft.flags.help_page import MEGATRON, print_help

USER_ERROR, INTERRUPTED = 2, 130
FLAG, NODES, DRY_RUN = "--nproc-per-node", "--nnodes", "--dry-run"
# A rank that leaves in agreement with the others: they come to the same end by themselves.
_AGREED = (0, USER_ERROR, 65, 75)
_AGREED_SECONDS, _CRASH_SECONDS, _INTERRUPT_SECONDS = 120.0, 5.0, 10.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOOK = 0.05  # seconds


def main(module: str, words: Sequence[str]) -> int:
    """`run`; a user's mistake is one line and status 2."""
    if print_help(words, scoring=module.endswith(".score")):  # without what a run imports
        return 0
    try:
        return run(module, words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def run(module: str, words: Sequence[str]) -> int:
    """Run `python -m module` with these words on as many ranks as they ask for; the exit status.

    Raises ValueError for a number of ranks that this machine cannot have.
    """
    if DRY_RUN in words:
        _dry_run([word for word in words if word != DRY_RUN])
    count, rest = take(FLAG, words)
    command = [sys.executable, "-m", module, *rest]
    if "RANK" in os.environ:
        if count is not None:
            raise ValueError(
                f"{FLAG}: another launcher has started this process as rank "
                f"{os.environ['RANK']}; drop the flag"
            )
    elif MEGATRON not in rest:
        ranks = _ranks(count or "1", rest)
        if ranks > 1:
            return _Ranks(command, ranks).wait()
    os.execve(sys.executable, command, os.environ | _of_run())
    raise AssertionError  # execve does not return


def _dry_run(words: Sequence[str]) -> None:
    """Become the first rank of the run that the words describe, which checks and ends."""
    count, rest = take(FLAG, words)
    nodes, rest = take(NODES, rest)
    for flag, value in ((FLAG, count), (NODES, nodes)):
        if value is not None and (not value.isdigit() or int(value) < 1):
            raise ValueError(f"{flag}: expected a whole number above 0, got {value!r}")
    local, every = int(count or 1), int(nodes or 1)
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": local * every, "LOCAL_WORLD_SIZE": local}
    command = [sys.executable, "-m", "megatron_dft.commands.dry_run", *rest]
    os.execve(sys.executable, command, os.environ | {k: str(v) for k, v in ranks.items()})


def take(flag: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(value of a flag or None, the other words)."""
    count, rest = None, []
    given = iter(words)
    for word in given:
        name, _, value = word.partition("=")
        if name.replace("_", "-") != flag:
            rest.append(word)
        else:
            count = value or next(given, "")
    return count, rest


def _ranks(count: str, words: Sequence[str]) -> int:
    gpus = _visible_gpus()
    on_cpu = not gpus or take("--device", words)[0] == "cpu"
    if count == "gpu" and not on_cpu:
        return gpus
    if not count.isdigit() or int(count) < 1:
        raise ValueError(
            f"{FLAG}: expected a whole number above 0{'' if on_cpu else ', or gpu'}, got {count!r}"
        )
    if not on_cpu and int(count) > gpus:
        raise ValueError(
            f"{FLAG}: expected at most one rank a GPU, of which there are {gpus}, got {count}; "
            "add --device cpu for a rehearsal"
        )
    if not on_cpu and int(count) < gpus:
        print(f"> {count} of {gpus} GPUs ({FLAG} gpu takes all)", flush=True)
    return int(count)


def _visible_gpus() -> int:
    """How many GPUs a rank will see, without torch, whose import takes seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in said.stdout.splitlines())


def _of_run() -> dict[str, str]:
    return {"MEGATRON_DFT_RUN": secrets.token_hex(8)}


def _die_with_parent() -> None:
    """In the child: it may not outlive a launcher that was killed, it would keep its GPU."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Ranks:
    """The processes of a run, each in a session of its own: its helpers end with it."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        # A thread pool in each would fight over the same cores.
        threads = max((os.cpu_count() or 1) // count, 1)
        common = _of_run() | {
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }  # fmt: skip
        self.ended: dict[int, int] = {}
        self.status: int | None = None  # of the run, once something has ended it
        self.deadline = 0.0  # until when the ranks may end by themselves
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | common | own,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def _pass_on(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            # A rank inside a collective does not hear it; a second one ends them at once.
            again = self.status is not None
            self.status = INTERRUPTED
            self.deadline = time.monotonic() + (0 if again else _INTERRUPT_SECONDS)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """The status of the run: that of the rank that failed first, 0 where none did."""
        try:
            while len(self.ended) < len(self.processes):
                self._look()
                failed = [status for status in self.ended.values() if status]
                if failed and self.status is None:
                    self.status = failed[0]
                    seconds = _AGREED_SECONDS if self.status in _AGREED else _CRASH_SECONDS
                    self.deadline = time.monotonic() + seconds
                if self.status is not None and time.monotonic() > self.deadline:
                    break
                time.sleep(_LOOK)
        finally:
            self._kill()
        return self.status or 0

    def _look(self) -> None:
        for rank, process in enumerate(self.processes):
            status = process.poll()
            if rank in self.ended or status is None:
                continue
            if status < 0:
                name = signal.Signals(-status).name
                print(f"error: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
                status = 128 - status
            self.ended[rank] = status

    def _kill(self) -> None:
        """Whatever is left of the ranks, with their helpers."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
