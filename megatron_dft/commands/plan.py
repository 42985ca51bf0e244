"""`megatron-dft plan`: which layouts fit a model on a cluster, their memory, the flags to paste.

megatron-dft plan Qwen2.5-Math-7B/ --nodes 2 --seq-length 4096 --global-batch-size 32
megatron-dft plan config.json --nodes 128 --seq-length 4096 --global-batch-size 512 --simulate
"""

import argparse
import os
import subprocess
import sys

from megatron_dft.cluster import layouts, memory, model_shape

SUMMARY = "layouts and memory for a job"
_GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("model", help="directory with config.json, that file, or a hub name")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB")
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
    if args.loss_chunk_size is not None and args.loss_chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {args.loss_chunk_size}; leave it "
            "out for Megatron's own cross entropy"
        )


def _table(rows: list[tuple[memory.Layout, memory.Bytes]], job: memory.Job, limit: float) -> None:
    head = ("TP", "PP", "CP", "EP", "DP", "micro", "bubble", "weights", "grads", "optim", "activ")
    print("".join(f"{word:>8}" for word in (*head, "logits", "sum GB")))
    for layout, size in rows:
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.expert, layout.data)
        parts = (size.weights, size.gradients, size.optimizer, size.activations, size.logits)
        print(
            "".join(f"{n:8d}" for n in (*sizes, job.micro_batches(layout)))
            + f"{memory.bubble(layout, job):8.1%}"
            + "".join(f"{part / _GB:8.1f}" for part in (*parts, size.total))
            + ("" if size.total <= limit else "  does not fit")
        )


def run(args: argparse.Namespace) -> int:
    """Print the layouts; ValueError where none divides or none fits."""
    _check(args)
    config = model_shape.read_config(args.model)
    shape = model_shape.shape_of(config)
    if shape.positions and args.seq_length > shape.positions:
        raise ValueError(
            f"--seq-length: the model has {shape.positions} positions, got {args.seq_length}; "
            "shorten it"
        )
    job = memory.Job(
        args.seq_length,
        args.global_batch_size,
        recompute=args.recompute,
        chunk=args.loss_chunk_size,
    )
    limit = args.gpu_memory * _GB
    found = [
        (layout, memory.fullest(shape, job, layout))
        for layout in layouts.dividing(shape, job, args.nodes, args.gpus_per_node)
        if all(
            getattr(args, name) in (None, getattr(layout, name))
            for name in ("tensor", "pipeline", "context", "expert")
        )
    ]
    world = args.nodes * args.gpus_per_node
    if not found:
        raise ValueError(
            f"no layout divides {shape.layers} layers, {shape.heads} heads, "
            f"{args.global_batch_size} rows over {world} GPUs; change --global-batch-size (a "
            "multiple of the replicas), --nodes or the sizes asked for"
        )
    fits = [row for row in found if row[1].total <= limit]
    # Every split costs communication; of the same amount of splitting, less waiting is better.
    order = lambda row: (  # noqa: E731
        row[0].tensor * row[0].context * row[0].pipeline,
        memory.bubble(row[0], job),
        row[0].pipeline,
        row[0].context,
        row[1].total,
    )
    print(
        f"{shape.total() / 1e9:.2f} B parameters on {args.nodes} × {args.gpus_per_node} GPUs of "
        f"{args.gpu_memory:g} GB; {args.global_batch_size} rows of {args.seq_length}: "
        f"{args.global_batch_size * args.seq_length:,} tokens a step"
    )
    if not fits:
        least = min(found, key=lambda row: row[1].total)
        _table([least], job, limit)
        raise ValueError(
            f"nothing fits {args.gpu_memory:g} GB: the smallest needs {least[1].total / _GB:.0f}; "
            "add nodes, --recompute, or --loss-chunk-size 2048"
        )
    fits.sort(key=order)
    _table(fits[: args.rows], job, limit)
    best = fits[0][0]
    flags = _flags(best, job)
    print(f"\n{len(fits)} of {len(found)} layouts fit; the first one's flags:\n{' '.join(flags)}")
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
