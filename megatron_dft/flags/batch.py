"""Megatron's flags of lengths, batches and layouts: refused where they do not divide."""

import argparse


def check(args: argparse.Namespace, world_size: int) -> None:
    """Raise one ValueError for a run that cannot be cut into rows, steps and ranks."""
    check_run_length(args)
    check_batch(args, world_size)


def check_run_length(args: argparse.Namespace) -> None:
    """How long the rows and the run are."""
    if args.seq_length is None:
        raise ValueError("--seq-length: expected the tokens of a row, got none")
    lengths = (args.train_iters, args.train_samples, args.train_epochs)
    if not any(lengths) and not args.skip_train:
        raise ValueError(
            "--train-iters: expected the number of steps (or --train-epochs), got none"
        )
    if args.lr is None and not args.skip_train:
        raise ValueError("--lr: expected a learning rate, got none; the paper's is 5e-5")
    longest = args.max_position_embeddings
    if longest is not None and args.seq_length > longest:
        raise ValueError(
            f"--seq-length: the model has {longest} positions, got {args.seq_length}; shorten it"
        )


def check_batch(args: argparse.Namespace, world_size: int) -> None:
    """Whether ranks, batches and rows divide as the layout asks."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"--tensor-model-parallel-size {tp} × --pipeline-model-parallel-size {pp} × "
            f"--context-parallel-size {cp} = {tp * pp * cp}: expected a divisor of the number of "
            f"ranks, got {world_size}; change the layout or --nproc-per-node"
        )
    if not args.no_packing and args.micro_batch_size != 1:
        raise ValueError(
            f"--micro-batch-size: a packed row is a micro-batch of 1, got {args.micro_batch_size}; "
            "raise --seq-length instead, or add --no-packing"
        )
    data_parallel = world_size // (tp * pp * cp)
    step = args.micro_batch_size * data_parallel
    if args.global_batch_size is not None and args.global_batch_size % step:
        raise ValueError(
            f"--global-batch-size: expected a multiple of --micro-batch-size "
            f"{args.micro_batch_size} × data-parallel size {data_parallel} = {step}, "
            f"got {args.global_batch_size}"
        )
    if args.expert_model_parallel_size > 1 and world_size % args.expert_model_parallel_size:
        raise ValueError(
            f"--expert-model-parallel-size: expected a divisor of the {world_size} ranks, "
            f"got {args.expert_model_parallel_size}"
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise ValueError(
            f"--sequence-parallel: --seq-length must divide by --tensor-model-parallel-size {tp}, "
            f"got {args.seq_length}"
        )
    if cp > 1 and args.seq_length % (2 * cp * (tp if args.sequence_parallel else 1)):
        raise ValueError(
            f"--context-parallel-size {cp}: --seq-length must divide by "
            f"{2 * cp * (tp if args.sequence_parallel else 1)}, got {args.seq_length}"
        )
