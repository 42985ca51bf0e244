"""Every rank proves that it trains the same run: flags, data, model, software, and rows read.

Ranks read their files themselves, and nothing is broadcast: a stale copy on one node would give
wrong gradients without a word. At start each rank's hashes are gathered over all ranks; after the
first step's forward and backward passes, before its update, so are the checksums of the rows that
each rank of a replica (tensor, pipeline, context parallel) has read.
"""

import hashlib
import json
import os
import platform
import socket
from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from megatron_dft.compat.hooks import wrap
from megatron_dft.recovery.resume import ResumeError
from megatron_dft.step import batch
from megatron_dft.training.identity import model_identity

# What each rank has of its own.
_OF_A_RANK = frozenset(("rank", "local_rank", "local_world_size"))
_REMEDY = {
    "flags": "start every rank with the same command line",
    "--train-data": "copy the same files to every node, or read them from a shared directory",
    "--valid-data": "copy the same files to every node, or read them from a shared directory",
    "--hf-model": "copy the same checkpoint to every node, or read it from a shared directory",
    "software": "install the same releases on every node",
    "rows of the first micro-batch": "copy the same files to every node, and name this as a fault "
    "of megatron_dft if they are the same",
}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flags(args: Any) -> dict[str, Any]:
    """The flags that are plain values; others print an address."""
    plain = (str, int, float, bool, type(None))

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(is_plain(item) for item in value)
        return isinstance(value, plain)

    return {k: v for k, v in vars(args).items() if k not in _OF_A_RANK and is_plain(v)}


def check_start(args: Any, data: dict[str, Any]) -> None:
    """Compare what this rank would train with all others'; collective over all ranks.

    Args:
        args: Megatron's, validated. data: flag → what its rows depend on (ChatDataset.identity).

    Raises:
        ResumeError: one line that names what differs, on which ranks, and the remedy.
    """
    if dist.get_world_size() == 1:
        return
    software = [platform.python_version(), torch.__version__, version("megatron-core")]
    mine = {"flags": _hash(_flags(args)), "software": _hash(software)}
    mine |= {flag: _hash(identity) for flag, identity in data.items()}
    # Of each file some blocks are read: once a node.
    if args.hf_model is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        mine["--hf-model"] = _hash(model_identity(args))
    _compare(mine, dist.get_world_size())


def _compare(mine: dict[str, str], ranks: int) -> None:
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, (mine, socket.gethostname()))
    for what in _REMEDY:
        found = {r: hashes[what] for r, (hashes, _) in enumerate(every) if what in hashes}
        if not found:
            continue
        usual, _ = Counter(found.values()).most_common(1)[0]
        odd = [r for r, value in found.items() if value != usual]
        if odd:
            _refuse(what, [f"{r} ({every[r][1]})" for r in odd], "most ranks")


def _refuse(what: str, odd: list[str], others: str) -> None:
    named = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
    raise ResumeError(
        f"{what}: expected the same on every rank, got something else than on {others} on rank "
        f"{named}; {_REMEDY[what]}"
    )


def check_first_rows() -> None:
    """Compare the rows of this rank's first micro-batch with its replica's other ranks'; collective
    over all ranks, once.

    Raises:
        ResumeError: as `check_start`.
    """
    replica = mpu.get_data_parallel_rank()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (replica, batch.first_rows(), socket.gethostname()))
    usual = {}
    for number in {r for r, _, _ in every}:
        counted = Counter(rows for r, rows, _ in every if r == number)
        usual[number] = counted.most_common(1)[0][0]
    odd = [f"{rank} ({host})" for rank, (r, rows, host) in enumerate(every) if rows != usual[r]]
    if odd:
        _refuse("rows of the first micro-batch", odd, "the other ranks of their replica")


def install() -> None:
    """Compare the first rows at the end of the first step's passes, before its update."""
    done: list[bool] = []

    def make(original):
        def should_checkpoint_and_exit(self):
            # All ranks come here together; inside a pass, a pipeline's stages would not.
            if not done:
                done.append(True)
                check_first_rows()
            return original(self)

        return should_checkpoint_and_exit

    wrap("megatron.core.rerun_state_machine:RerunStateMachine.should_checkpoint_and_exit", make)
