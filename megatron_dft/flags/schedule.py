"""Megatron's flags of the learning rate: refused where no schedule can be made of them.

Megatron asserts the same when its scheduler is built, after the model, mostly without a word.
"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The length of a run in epochs, beside Megatron's --train-iters and --train-samples."""
    parser.add_argument_group("schedule").add_argument(
        "--train-epochs",
        type=float,
        metavar="N",
        help="train on every conversation N times, in place of --train-iters: as many steps as the "
        "rows of N epochs fill, the last one whole; 0.5 is half an epoch",
    )


def steps_of(rows: int, global_batch_size: int) -> int:
    """Steps that read so many rows at least once."""
    return -(-rows // global_batch_size)


def check_epochs(args: argparse.Namespace) -> None:
    """Raise one ValueError where --train-epochs cannot be, or contradicts another length."""
    epochs = args.train_epochs
    if epochs is None:
        return
    if not 0 < epochs < float("inf"):
        raise ValueError(f"--train-epochs: expected a number above 0, got {epochs:g}")
    for dest in ("train_iters", "train_samples"):
        if getattr(args, dest):
            name = "--" + dest.replace("_", "-")
            raise ValueError(
                f"--train-epochs {epochs:g}: says how long the run is, and so does {name} "
                f"{getattr(args, dest)}; drop one of the two"
            )
    if args.rampup_batch_size is not None:
        raise ValueError(
            "--train-epochs: counts steps of one global batch size, --rampup-batch-size changes "
            "it; give --train-samples"
        )


def check(args: argparse.Namespace) -> None:
    """Raise one ValueError; args parsed, not yet validated by Megatron."""
    if args.skip_train or args.lr is None:
        return
    _check_rates(args)
    _check_warmup(args)
    _check_decay(args)
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ValueError(
            "--override-opt_param-scheduler: contradicts --use-checkpoint-opt_param-scheduler; "
            "drop one of the two"
        )


def _check_rates(args: argparse.Namespace) -> None:
    rates = (
        ("--lr", args.lr, None),
        ("--min-lr", args.min_lr, args.lr),
        ("--lr-warmup-init", args.lr_warmup_init, args.lr),
    )
    for flag, value, most in rates:
        if value is None:
            continue
        if not 0 <= value < float("inf"):
            raise ValueError(f"{flag}: expected a rate of at least 0, got {value:g}")
        if most is not None and value > most:
            raise ValueError(f"{flag}: expected at most --lr {most:g}, got {value:g}; lower it")


def _check_warmup(args: argparse.Namespace) -> None:
    fraction = args.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(
            f"--lr-warmup-fraction: expected a share of the decay from 0 to below 1, got "
            f"{fraction:g}"
        )
    unit = "samples" if args.train_samples else "iters"
    flag, length = _decay(args, unit)
    warmup = getattr(args, f"lr_warmup_{unit}")
    if warmup < 0:
        raise ValueError(f"--lr-warmup-{unit}: expected at least 0, got {warmup}")
    if length and warmup >= length:
        raise ValueError(
            f"--lr-warmup-{unit}: expected a warm-up shorter than {flag} {length}, got {warmup}; "
            f"shorten it, or give --lr-warmup-fraction (the paper's is 0.1)"
        )


def _check_decay(args: argparse.Namespace) -> None:
    unit = "samples" if args.train_samples else "iters"
    flag, length = _decay(args, unit)
    if length is not None and length < 1:
        raise ValueError(f"{flag}: expected at least 1, got {length}")
    if args.lr_decay_style != "WSD":
        return
    last = getattr(args, f"lr_wsd_decay_{unit}")
    if last is None or (length and not 0 < last <= length):
        raise ValueError(
            f"--lr-wsd-decay-{unit}: --lr-decay-style WSD expects the length of its last part, "
            f"from 1 to {flag} {length}, got {last}"
        )


def _decay(args: Any, unit: str) -> tuple[str, Any]:
    """The flag that says how long the learning rate decays, and its value."""
    own = getattr(args, f"lr_decay_{unit}")
    if own is not None:
        return f"--lr-decay-{unit}", own
    return f"--train-{unit}", getattr(args, f"train_{unit}")
