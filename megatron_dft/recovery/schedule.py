"""Whether a resumed run goes on with the learning rates it had, and what its flags say where not.

Megatron compares its scheduler with the checkpoint's after the model is built, by assertions in
samples (core/optimizer_param_scheduler.py). Here the two are compared before, in the words of the
flags. What changes no learning rate and no weight decay (a longer run at a constant one) goes on by
itself.
"""

from typing import Any

from megatron_dft.compat import learning_rates
from megatron_dft.recovery.resume import ResumeError

# Scheduler's name → flag; lengths, which it counts in samples, apart.
_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
}
_LENGTHS = ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")


def of_args(args: Any) -> dict[str, Any]:
    """What Megatron's get_optimizer_param_scheduler makes of validated args (training.py)."""
    if args.train_iters:
        batch = args.global_batch_size
        decay = (args.lr_decay_iters or args.train_iters) * batch
        warmup, whole = args.lr_warmup_iters * batch, args.train_iters * batch
    else:
        decay = args.lr_decay_samples or args.train_samples
        warmup, whole = args.lr_warmup_samples, args.train_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "max_lr": float(args.lr),
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_style": args.weight_decay_incr_style,
        "wd_incr_steps": whole,
    }


def settle(args: Any, saved: dict[str, Any], where: str, batch: int | None = None) -> list[str]:
    """Let `args` go on from a checkpoint with the scheduler state `saved`; returns what to say.

    batch: the checkpoint's --global-batch-size; None: this run's.

    Raises ResumeError, naming flag and remedy, for another schedule without Megatron's
    --override-opt_param-scheduler or --use-checkpoint-opt_param-scheduler.
    """
    now = of_args(args)
    different = [name for name in now if name in saved and saved[name] != now[name]]
    if not different:
        return []
    batch = batch or args.global_batch_size
    said = list(
        dict.fromkeys(_word(args, batch, name, saved[name], now[name]) for name in different)
    )
    if args.train_iters and batch != args.global_batch_size and set(different) & {*_LENGTHS}:
        said = [
            f"--global-batch-size was {batch}, is {args.global_batch_size}, and lengths count "
            "samples",
            *filter(None, said),
        ]
    if args.use_checkpoint_opt_param_scheduler:
        args.lr, args.min_lr = saved["max_lr"], saved["min_lr"]
        return [f"--use-checkpoint-opt_param-scheduler: {line}; as it was" for line in said]
    if not args.override_opt_param_scheduler:
        if not _unchanged(different, saved, now):
            raise ResumeError(
                f"--load {where}: another schedule: {'; '.join(said)}; restore it, take the "
                "checkpoint's with --use-checkpoint-opt_param-scheduler, or go on with the new one "
                "by --override-opt_param-scheduler"
            )
        args.override_opt_param_scheduler = True
    learning_rates.rename_on_load({name: {saved[name]: now[name]} for name in ("max_lr", "min_lr")})
    return said


def _unchanged(different: list[str], saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether only lengths differ that no learning rate or weight decay of the run depends on."""
    free = set()
    if now["lr_decay_style"] == "constant" and now["lr_warmup_steps"] == saved["lr_warmup_steps"]:
        free |= {"lr_decay_steps", "min_lr"}
    if now["wd_incr_style"] == "constant":
        free.add("wd_incr_steps")
    return set(different) <= free


def _word(args: Any, before: int, name: str, saved: Any, now: Any) -> str:
    """One difference in the words of the flags: lengths in steps (of `before` samples then), where
    they are whole. Empty where it is the same number of steps."""
    flag = _FLAGS.get(name)
    unit = ""
    if flag is None:
        in_steps = bool(args.train_iters)
        flag = _length_flag(args, name, "iters" if in_steps else "samples")
        batch = args.global_batch_size if in_steps else 1
        before = before if in_steps else 1
        unit = " steps" if in_steps else " samples"
        if saved % before or now % batch:  # of a share of warm-up
            before, batch = 1, 1
            unit = f" samples (in steps of --global-batch-size {args.global_batch_size})"
        saved, now = saved / before, now / batch
        if saved == now:
            return ""
    return f"{flag} was {_number(saved)}{unit}, is {_number(now)}{unit}"


def _length_flag(args: Any, name: str, unit: str) -> str:
    if name == "lr_warmup_steps":
        fraction = args.lr_warmup_fraction is not None
        return "--lr-warmup-fraction: the warm-up" if fraction else f"--lr-warmup-{unit}"
    if name == "lr_decay_steps" and getattr(args, f"lr_decay_{unit}") is not None:
        return f"--lr-decay-{unit}"
    return f"--train-{unit}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
