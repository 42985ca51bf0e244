"""`megatron-dft preflight`: one quick look at every node of an allocation before the real job.

    srun --ntasks-per-node 1 megatron-dft preflight --run-dir DIR --master-addr HOST -- FLAGS…

One process a node. They meet, compare what they found, measure the fabric, and the first one prints
a table; every process exits with 1 where any node is bad. The first one also lets the training
command's own checks run on its flags (dry_run.py), with the first rows of the data: what they
refuse, and a path that no node can read, is the job's fault and no node's: status 2.
"""

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dft.cluster import node_checks
from megatron_dft.compat import loopback
from megatron_dft.flags.defaults import has_transformer_engine
from megatron_dft.recovery.exit_codes import REFUSED
from megatron_dft.training import attention, machine

SUMMARY = "check the nodes of an allocation"
_SKEW = 5.0  # seconds
_ROWS = 256  # of each item, that the training command's checks read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; the training command's flags follow `--`."""
    parser.add_argument("--run-dir", type=Path, required=True, help="where checkpoints will go")
    parser.add_argument("--master-addr", default="127.0.0.1", help="the first node")
    parser.add_argument("--master-port", type=int, default=29600)
    parser.add_argument("--procs-per-node", type=int, default=8, help="GPUs expected on each node")
    parser.add_argument("--need-gb", type=float, default=10.0, help="free space that is enough")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument(
        "--nodes-only",
        action="store_true",
        help="leave out the training command's own checks: it has been accepted before",
    )
    parser.add_argument("training", nargs="*", help="flags of the training command")


def _place() -> tuple[int, int]:
    rank = os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0"))
    size = os.environ.get("SLURM_NTASKS", os.environ.get("WORLD_SIZE", "1"))
    return int(rank), int(size)


def _fabric(backend: str, mebibytes: int = 64, rounds: int = 3) -> float:
    """GB/s of an all-reduce between the nodes, one process each: 2 (n − 1) / n bytes a byte."""
    device = "cuda" if backend == "nccl" else "cpu"
    data = torch.zeros(mebibytes << 18, device=device)
    dist.all_reduce(data)
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(rounds):
        dist.all_reduce(data)
    if device == "cuda":
        torch.cuda.synchronize()
    size = dist.get_world_size()
    moved = rounds * data.numel() * 4 * 2 * (size - 1) / size
    return moved / 1e9 / (time.monotonic() - began)


def training_refuses(training: list[str], nodes: int, procs: int, seconds: float) -> list[str]:
    """Why the training command would refuse its flags on these nodes; [] where it would not."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": nodes * procs, "LOCAL_WORLD_SIZE": procs}
    command = [sys.executable, "-m", "megatron_dft.commands.dry_run", *training]
    try:
        done = subprocess.run(
            [*command, "--check-rows", str(_ROWS)],
            env=os.environ | {name: str(value) for name, value in ranks.items()},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return [f"the training command's own checks did not end within {seconds:g} s (--timeout)"]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return [] if done.returncode == 0 else said[-1:] or [f"status {done.returncode}"]


def faults_of_job(reports: list[dict[str, Any]], refused: list[str]) -> list[str]:
    """What no other node would mend; a path that some nodes can read is a complaint of the rest."""
    everywhere = set.intersection(*(set(r["unreadable"]) for r in reports))
    for report in reports:
        report["wrong"] += [line for line in report["unreadable"] if line not in everywhere]
    paths = sorted(f"error: {line} on any node" for line in everywhere)
    return paths or refused


def judge(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what only a comparison shows: a version or a clock unlike the others'."""
    names = reports[0]["versions"].keys()
    usual = {n: Counter(r["versions"].get(n) for r in reports).most_common(1)[0][0] for n in names}
    middle = sorted(r["clock"] for r in reports)[len(reports) // 2]
    for report in reports:
        for name, version in report["versions"].items():
            if version != usual[name]:
                report["wrong"].append(f"{name} {version}, the others have {usual[name]}")
        skew = report["clock"] - middle
        if abs(skew) > _SKEW:
            report["wrong"].append(f"its clock is {skew:+.0f} s off")
    return reports


def _print(reports: list[dict[str, Any]], bandwidth: float | None) -> None:
    print(f"{'node':20}{'GPUs':>6}{'free GB':>10}{'write MB/s':>12}  verdict")
    for r in reports:
        verdict = "; ".join(r["wrong"]) or "ok"
        print(f"{r['host']:20}{r['gpus']:6d}{r['free']:10.1f}{r['speed']:12.0f}  {verdict}")
    print("  ".join(f"{name} {version}" for name, version in reports[0]["versions"].items()))
    for line in reports[0]["machine"]:
        print(line)
    if bandwidth is not None:
        print(f"all-reduce between the nodes: {bandwidth:.1f} GB/s")
    bad = [r["host"] for r in reports if r["wrong"]]
    if bad:
        print(f"bad nodes: {','.join(bad)} (leave them out: sbatch --exclude {','.join(bad)})")


def _machine(training: list[str]) -> tuple[list[str], list[str]]:
    """(lines on what this node is, complaints): the attention of --hf-model's packed rows too."""
    chosen = None
    shape = attention.of_command_line(training)
    if shape is not None and torch.cuda.is_available() and has_transformer_engine():
        chosen = attention.backend(shape)
    lines = machine.describe(chosen, "packed rows" if shape and shape.packed else "rows")
    if chosen is None or chosen in (attention.FUSED, attention.FLASH):
        return lines, []
    return lines, [f"attention is {chosen}: {machine.UNFUSED_REMEDY}"]


def run(args: argparse.Namespace) -> int:
    """Status 0 where every node is fit, 1 where not or where they do not meet in time, 2 where the
    training command's flags are refused."""
    rank, size = _place()
    found = node_checks.check(args.run_dir, args.procs_per_node, args.need_gb, args.training)
    loopback.install()
    backend = "nccl" if found["gpus"] and not found["wrong"] else "gloo"
    try:
        # The nodes agree over gloo first: a node without GPUs could not join NCCL.
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{args.master_addr}:{args.master_port}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=args.timeout),
        )
        dist.barrier()
        found |= {"clock": time.time(), "backend": backend}
        found["machine"], unfused = _machine(args.training)
        found["wrong"] += unfused
        found["refused"] = []
        if rank == 0 and args.training and not args.nodes_only:
            procs = args.procs_per_node
            found["refused"] = training_refuses(args.training, size, procs, args.timeout - 30)
        reports: list[Any] = [None] * size
        dist.all_gather_object(reports, found)
    except Exception as error:
        print(f"{found['host']}: the nodes do not meet: {str(error).splitlines()[0]}", flush=True)
        return 1
    judge(reports)
    faults = faults_of_job(reports, reports[0]["refused"])
    bandwidth = None
    if size > 1:
        if all(r["backend"] == "nccl" for r in reports):
            dist.destroy_process_group()
            dist.init_process_group(
                "nccl",
                init_method=f"tcp://{args.master_addr}:{args.master_port + 1}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=args.timeout),
            )
            bandwidth = _fabric("nccl", 256)
        else:
            bandwidth = _fabric("gloo")
    if rank == 0:
        _print(reports, bandwidth)
        for line in faults:
            print(f"{line} (the job's fault, no node's)")
    # Threads of a group that is still there at the interpreter's end abort the process.
    dist.barrier()
    dist.destroy_process_group()
    if faults:
        return REFUSED
    return 1 if any(r["wrong"] for r in reports) else 0
