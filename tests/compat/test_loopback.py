"""A store whose address is this machine's own listens there alone."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
# Two ranks under our torchrun: what rank 0's store and the launcher's listen on.
PROGRAM = """
import os, sys
import torch.distributed as dist
from megatron_dft.compat import loopback
loopback.install()
dist.init_process_group("gloo")
every = [None] * 2
dist.all_gather_object(every, dist.get_rank())
assert every == [0, 1]
def sockets(pid):
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            pass
    return found
mine = sockets(os.getpid()) | sockets(os.getppid())
for name in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine and dist.get_rank() == 0:
            # In one write: the ranks share a stream.
            os.write(1, f"LISTENS {fields[1].split(':')[0]}\\n".encode())
dist.barrier()
"""
LOOPBACK = "0100007F"


def test_nothing_of_a_job_of_one_node_listens_to_the_network(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["-m", "megatron_dft.compat.loopback", "--nproc-per-node", "2", tmp_path / "program.py"]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("LISTENS")]
    # The launcher's two stores, at least.
    assert len(found) >= 2 and set(found) == {LOOPBACK}


def test_a_free_port_is_handed_to_nobody_else_and_can_be_listened_on():
    """Two runs that begin together, and whoever connects somewhere in between."""
    from megatron_dft.compat import loopback

    ports = [loopback.free_port() for _ in range(20)]
    others = set()
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            other = stack.enter_context(socket.socket())
            other.bind(("127.0.0.1", 0))
            others.add(other.getsockname()[1])
    assert len({*ports}) == 20 and not others & {*ports}
    for port in ports:
        loopback._listen("127.0.0.1", port).close()


@pytest.fixture
def store():
    from megatron_dft.compat import hooks, loopback

    loopback.install()
    yield
    hooks.undo()


def test_a_port_that_is_taken_is_said_and_one_of_our_own_is_shared(store):
    import torch.distributed as dist

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match="Address already in use"):
            dist.TCPStore("127.0.0.1", taken.getsockname()[1], 1, True)
    first = dist.TCPStore("localhost", 0, 1, True, wait_for_workers=False)
    second = dist.TCPStore("127.0.0.1", first.port, 1, True, wait_for_workers=False)
    first.set("key", "value")
    assert second.get("key") == b"value"


def _meet():
    """As a run starts: the ranks meet for the data, then at the same address for training."""
    import torch
    import torch.distributed as dist

    from megatron_dft.compat import loopback
    from megatron_dft.training import waiting

    loopback.install()
    with waiting.met_after():
        pass
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    return float(total), _listening()


def _listening() -> set[str]:
    """The addresses, in the kernel's hexadecimal, on which this process listens."""
    mine = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {f[1].split(":")[0] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in mine}


def test_ranks_that_meet_before_training_do_so_on_the_loopback_interface():
    (total, first), (_, second) = run_ranks(_meet, 2, init=False)
    assert total == 2.0 and first | second == {LOOPBACK}
