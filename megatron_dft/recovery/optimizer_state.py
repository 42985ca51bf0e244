"""Whether a checkpoint's optimizer state is the one that this run's flags ask for.

Megatron loads it by form: another optimizer or precision ends in whatever error its keys give, and
Adam's own numbers come from the checkpoint, whatever the flags say. Both are found here before a
model is built.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dft.recovery.resume import ResumeError

# What the state's form depends on: none of it loads as another.
_FORM = ("optimizer", "bf16", "fp16", "use_distributed_optimizer")
# What lies in the state, by optimizer.
_NUMBERS = {"adam": ("adam_beta1", "adam_beta2", "adam_eps"), "sgd": ("sgd_momentum",)}
BATCH = "global_batch_size"


def read(iteration_directory: Path) -> dict[str, dict[str, Any]]:
    """What a torch_dist checkpoint says of its run: "scheduler", the state of Megatron's scheduler,
    and "args", those of its arguments that `check` and the schedule compare.

    Empty where it cannot be read: Megatron will say so in a moment, on every rank.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        common = dist_checkpointing.load_common_state_dict(str(iteration_directory))
    except (CheckpointingException, OSError):
        return {}
    saved = common.get("args")
    names = [*_FORM, *(name for own in _NUMBERS.values() for name in own), BATCH]
    args = {name: getattr(saved, name) for name in names if hasattr(saved, name)}
    return {"args": args, "scheduler": common.get("opt_param_scheduler") or {}}


def check(args: Any, saved: Mapping[str, Any], where: str) -> None:
    """Raises ResumeError, naming flag and remedy, where `saved` (of `read`) is another optimizer's.

    What an older checkpoint does not say is not compared.
    """
    names = [*_FORM, *_NUMBERS.get(args.optimizer, ())]
    said = [
        f"--{name.replace('_', '-')} was {_word(saved[name])}, is {_word(getattr(args, name))}"
        for name in names
        if name in saved and saved[name] != getattr(args, name)
    ]
    if said:
        raise ResumeError(
            f"--load {where}: another optimizer: {'; '.join(said)}; restore it, or go on from the "
            "weights alone with --no-load-optim"
        )


def _word(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
