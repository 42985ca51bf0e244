"""The ranks that do not read the data wait for those that do, for as long as it takes.

The first rank of each node tokenises before there are process groups. Waiting inside
torch.distributed would end the others after --distributed-timeout-minutes, and tokenising may take
an hour. So all ranks meet at a store first, the one at MASTER_ADDR:MASTER_PORT that torch will
use: torchrun's, or rank 0's own.
"""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_MEETING = datetime.timedelta(minutes=30)  # for the slowest rank to start
_LOOK = 0.2  # seconds
# Rank 0 that refuses holds its store so long for those that still start: without it they would look
# for it until _MEETING is over.
_FAREWELL = 60.0  # seconds
_REFUSED = "another node refuses its data; its own line says why"
# Rank 0's server serves torch's rendezvous too, which takes the one of its process and port.
_kept: list[dist.TCPStore] = []


class OthersRefused(ValueError):
    """Another node's data is refused; its own first rank says why."""


@contextmanager
def met_after() -> Iterator[None]:
    """Do what is in the block on this rank, then wait until every rank has done so.

    Raises:
        OthersRefused: some rank's block raised an exception.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world == 1:
        yield
        return
    store, name = _store(world), f"megatron_dft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        yield
    except BaseException as error:
        gone = store.add(f"{name}/refused", 1) + store.add(f"{name}/told", 0)
        if _holds_store() and isinstance(error, Exception):
            until = time.monotonic() + _FAREWELL
            while gone < world and time.monotonic() < until:
                time.sleep(_LOOK)
                gone = store.add(f"{name}/refused", 0) + store.add(f"{name}/told", 0)
        raise
    try:
        store.add(f"{name}/ready", 1)
        while store.add(f"{name}/ready", 0) < world:
            if store.add(f"{name}/refused", 0):
                store.add(f"{name}/told", 1)
                raise OthersRefused(_REFUSED)
            time.sleep(_LOOK)
    except RuntimeError:  # rank 0, which may hold the store, has gone
        raise OthersRefused(_REFUSED) from None


def _holds_store() -> bool:
    """Whether the store ends with this process: rank 0's, where no torchrun has one."""
    agent_s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ["RANK"] == "0" and not agent_s


def _store(world: int) -> dist.TCPStore:
    """A client of torchrun's store, or of rank 0's own."""
    # By its present name: compat/loopback.py replaces it.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=_holds_store(),
        timeout=_MEETING,
        wait_for_workers=False,
        multi_tenant=True,
    )
    _kept.append(store)
    return store
