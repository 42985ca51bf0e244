"""Megatron's flags of the learning rate: refused where no schedule can be made of them.

Megatron asserts the same when its scheduler is built, after the model, mostly without a word.
"""

import argparse
from typing import Any


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
    unit = "iters" if args.train_iters else "samples"
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
    unit = "iters" if args.train_iters else "samples"
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
