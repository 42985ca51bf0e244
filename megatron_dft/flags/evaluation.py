"""Flags of evaluation during training: --valid-data is evaluated on whole, by itself.

Megatron evaluates --eval-iters global batches every --eval-interval steps and at the end; here the
first is what covers the data once, the second a tenth of the run, wherever they are not given.
"""

import argparse
from collections.abc import Mapping
from typing import Any

PARTS = 10  # evaluations of a run, but for one
LEAST = 10  # steps between two
OPEN = 0  # an interval that the number of steps is to decide


def data_flag(args: Any) -> str | None:
    """The flag that names what is evaluated on; None where nothing is."""
    if args.valid_data:
        return "--valid-data"
    return "--valid-share" if args.valid_share else None


def is_whole(args: Any, given: Mapping[str, Any]) -> bool:
    """Whether each evaluation reads all of the data once; `given`: flags of the command line."""
    return data_flag(args) is not None and "eval_iters" not in given


def interval(args: Any, given: Mapping[str, Any]) -> int:
    """Steps between two evaluations."""
    if "eval_interval" in given or data_flag(args) is None:
        return args.eval_interval
    if args.train_epochs is not None:
        return OPEN
    steps = args.train_iters or 0
    if args.train_samples and args.global_batch_size:
        steps = args.train_samples // args.global_batch_size
    return tenth(steps)


def tenth(steps: int) -> int:
    """Steps between two evaluations of a run of so many."""
    return max(-(-steps // PARTS), LEAST)


def check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise one ValueError for flags that contradict the evaluation that the data asks for."""
    flag = data_flag(args)
    if flag is None:
        for dest in ("eval_iters", "full_validation", "eval_interval"):
            if given.get(dest):
                name = "--" + dest.replace("_", "-")
                value = "" if given[dest] is True else f" {given[dest]}"
                raise ValueError(
                    f"{name}{value}: needs --valid-data, got none; give it (or --valid-share) or "
                    "drop the flag"
                )
        return
    if "eval_iters" in given and args.eval_iters < 1:
        raise ValueError(
            f"--eval-iters {args.eval_iters}: {flag} asks for evaluation; drop one of the two"
        )
    if args.full_validation and "eval_iters" in given:
        raise ValueError(
            f"--full-validation: contradicts --eval-iters {args.eval_iters}; drop one of the two "
            f"(without both {flag} is read whole)"
        )
    if args.eval_interval < 1:
        raise ValueError(
            f"--eval-interval: expected at least 1 step, got {args.eval_interval}; a number beyond "
            "the last step evaluates at the end alone"
        )
    if args.multiple_validation_sets:
        raise ValueError(
            f"--multiple-validation-sets: {flag} is one set, with the loss of each of its items; "
            "drop the flag"
        )


def check_iters(args: Any, rows: int) -> None:
    """Raise ValueError where --eval-iters, as given, would read rows twice; `rows`: of the data."""
    whole = rows // args.eval_global_batch_size
    if args.eval_iters > whole:
        raise ValueError(
            f"--eval-iters: {data_flag(args)} has {whole} global batches of "
            f"{args.eval_global_batch_size} rows, got {args.eval_iters}, which would read some "
            "twice; leave the flag out to read it whole"
        )
