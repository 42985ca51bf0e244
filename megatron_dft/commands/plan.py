"""`megatron-dft plan`: layouts that fit a model on a cluster: memory, speed, the flags to paste.

megatron-dft plan Qwen2.5-Math-7B/ --nodes 2 --seq-length 4096 --global-batch-size 32
megatron-dft plan config.json --nodes 128 --seq-length 4096 --global-batch-size 512 --simulate
"""

import argparse
import math
import os
import subprocess
import sys

from megatron_dft.cluster import memory, model_shape, ranking, speed
from megatron_dft.losses import registry
from megatron_dft.losses.weighting import WEIGHT_SOURCES

SUMMARY = "layouts, memory and an estimate of the speed for a job"
_REFERENCE = {"reference_log_prob", "kl"}  # needs of an objective that a frozen model serves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("model", help="directory with config.json, that file, or a hub name")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--gpu", choices=speed.GPUS, default="h100", help="its speed and memory; default: h100"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="default: the GPU's")
    parser.add_argument(
        "--node-link",
        type=float,
        default=speed.NODE_LINK / 1e9,
        metavar="GB/S",
        help="between nodes, a GPU and direction; default: %(default)g (400 Gb/s each)",
    )
    parser.add_argument(
        "--loss",
        default="dft",
        choices=registry.OBJECTIVES,
        help="its frozen reference and the KL's logits count; default: dft",
    )
    parser.add_argument("--kl-coeff", type=float, default=0.0, help="as in training")
    parser.add_argument(
        "--dft-weight-from", choices=WEIGHT_SOURCES, default="model", help="as in training"
    )
    parser.add_argument(
        "--dft-reference-scores",
        action="store_true",
        help="the reference's scores are stored beside the data: no frozen model is held",
    )
    parser.add_argument(
        "--hours",
        metavar="TOKENS",
        help="how long so many tokens take, such as 3.2e8, 320M, 1.2B (`inspect-data` counts them)",
    )
    parser.add_argument("--seq-length", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--global-batch-size", type=int, default=32, metavar="ROWS")
    parser.add_argument("--loss-chunk-size", type=int, metavar="TOKENS")
    parser.add_argument("--recompute", action="store_true", help="recompute every layer")
    parser.add_argument("--rows", type=int, default=8, help="layouts to show; default: 8")
    for name in ("tensor", "pipeline", "context", "expert"):
        parser.add_argument(
            f"--{name}-model-parallel-size"
            if name in ("tensor", "pipeline", "expert")
            else "--context-parallel-size",
            dest=name,
            type=int,
            help="only layouts of this size",
        )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="build the best layout's process groups at full size on this machine, after the real "
        "validation of its flags",
    )


def _flags(layout: memory.Layout, job: memory.Job) -> list[str]:
    words = []
    for value, flag in (
        (layout.tensor, "--tensor-model-parallel-size"),
        (layout.pipeline, "--pipeline-model-parallel-size"),
        (layout.context, "--context-parallel-size"),
        (layout.expert, "--expert-model-parallel-size"),
    ):
        if value > 1:
            words += [flag, str(value)]
    if layout.tensor > 1:
        words.append("--sequence-parallel")
    if layout.expert > 1 and layout.tensor > 1:
        words += ["--expert-tensor-parallel-size", "1"]
    if job.chunk is not None:
        words += ["--loss-chunk-size", str(job.chunk)]
    if job.recompute:
        words += "--recompute-granularity full --recompute-method uniform".split()
        words += ["--recompute-num-layers", "1"]
    return [
        *words,
        "--bf16",
        "--use-distributed-optimizer",
        *("--micro-batch-size", "1", "--global-batch-size", str(job.global_batch)),
        *("--seq-length", str(job.seq_length)),
    ]


def _check(args: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "seq_length", "global_batch_size", "rows"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: expected at least 1, got {getattr(args, name)}")
    if args.node_link <= 0:
        raise ValueError(f"--node-link: expected GB/s above 0, got {args.node_link:g}")
    if args.gpu_memory is not None and args.gpu_memory <= 0:
        raise ValueError(f"--gpu-memory: expected GB above 0, got {args.gpu_memory:g}")
    if args.loss_chunk_size is not None and args.loss_chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {args.loss_chunk_size}; leave it "
            "out for Megatron's own cross entropy"
        )


def _job(args: argparse.Namespace) -> memory.Job:
    objective = registry.get(args.loss, weight_from=args.dft_weight_from)
    needs = objective.needs
    kl = "kl" in needs or args.kl_coeff != 0
    if (kl or objective.wants_mass) and args.dft_reference_scores:
        raise ValueError(
            f"--dft-reference-scores: --loss {args.loss} with --kl-coeff {args.kl_coeff:g} and "
            f"--dft-weight-from {args.dft_weight_from} compares whole distributions, expected no "
            "stored scores; drop it, and a frozen model is held"
        )
    return memory.Job(
        args.seq_length,
        args.global_batch_size,
        recompute=args.recompute,
        chunk=args.loss_chunk_size,
        reference=kl or bool(_REFERENCE & needs and not args.dft_reference_scores),
        kl=kl,
    )


def _tokens(text: str) -> float:
    """A number of tokens, with K, M, B or T behind it or not."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        count = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        count = math.nan
    if not 1 <= count < math.inf:
        raise ValueError(f"--hours: expected a number of tokens such as 3.2e8 or 320M, got {text}")
    return count


def run(args: argparse.Namespace) -> int:
    """Print the layouts; ValueError where none divides or none fits."""
    _check(args)
    tokens = None if args.hours is None else _tokens(args.hours)
    shape = model_shape.shape_of(model_shape.read_config(args.model))
    if shape.positions and args.seq_length > shape.positions:
        raise ValueError(
            f"--seq-length: the model has {shape.positions} positions, got {args.seq_length}; "
            "shorten it"
        )
    job, gpu = _job(args), speed.GPUS[args.gpu]
    gigabytes = args.gpu_memory or gpu.gigabytes
    on = speed.Cluster(gpu, args.gpus_per_node, args.node_link * 1e9)
    rows = [
        row
        for row in ranking.ranked(shape, job, args.nodes, on, gigabytes)
        if all(
            getattr(args, name) in (None, getattr(row.layout, name))
            for name in ("tensor", "pipeline", "context", "expert")
        )
    ]
    world = args.nodes * args.gpus_per_node
    if not rows:
        raise ValueError(
            f"no layout divides {shape.layers} layers, {shape.heads} heads, "
            f"{args.global_batch_size} rows over {world} GPUs; change --global-batch-size (a "
            "multiple of the replicas), --nodes or the sizes asked for"
        )
    print(
        f"{shape.total() / 1e9:.2f} B parameters on {args.nodes} × {args.gpus_per_node} "
        f"{args.gpu.upper()} of {gigabytes:g} GB, --loss {args.loss}; "
        f"{args.global_batch_size} rows of {args.seq_length}: "
        f"{args.global_batch_size * args.seq_length:,} tokens a step"
    )
    fits = [row for row in rows if row.share(gigabytes) <= 1]
    if not fits:
        least = min(rows, key=lambda row: row.size.total)
        print("\n".join(ranking.table([least], job, gigabytes)))
        raise ValueError(
            f"nothing fits {gigabytes:g} GB: the smallest needs {least.size.total / 1e9:.0f}; "
            "add nodes, --recompute, or --loss-chunk-size 2048"
        )
    print("\n".join(ranking.table(fits[: args.rows], job, gigabytes)))
    best = fits[0]
    print(
        "tokens/s is an estimate from one measured GPU and the links' published speeds "
        "(megatron_dft/cluster/speed.py), good for the order; nothing above "
        f"{ranking.FULL:.0%} of the memory comes before what is below, and within 5 % the one with "
        "fewer splits comes first"
    )
    if tokens is not None:
        hours = tokens / best.tokens_per_second / 3600
        said = f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
        print(f"{tokens:,.0f} tokens: about {said} hours with the first")
    flags = [*_flags(best.layout, job), "--loss", args.loss]
    if args.kl_coeff:
        flags += ["--kl-coeff", f"{args.kl_coeff:g}"]
    print(f"\n{len(fits)} of {len(rows)} layouts fit; the first one's flags:\n{' '.join(flags)}")
    return _simulate(args, world, flags) if args.simulate else 0


def _simulate(args: argparse.Namespace, world: int, flags: list[str]) -> int:
    command = [sys.executable, "-m", "megatron_dft.commands.simulate", args.model, *flags]
    env = os.environ | {
        "WORLD_SIZE": str(world),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(args.gpus_per_node),
    }
    return subprocess.run(command, env=env).returncode
