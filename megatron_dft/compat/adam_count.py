"""A checkpoint of one Adam goes on in another: torch's on a CPU, FusedAdam on a GPU.

Both have the same moments and count their steps in different places: torch a tensor in each
parameter's state, Transformer Engine's and apex's FusedAdam an int in each parameter group.
megatron-core 0.19.2 (core/optimizer/optimizer.py, distrib_optimizer.py) writes the count where the
saving one has it. Loading it then fails (KeyError: 'step': in torch's first step, and in FusedAdam,
which takes it for a moment), or gives FusedAdam's kernel a float, which it refuses. And in fp32 the
distributed optimizer copies into views of the parameters, which autograd refuses, whoever steps.
"""

from typing import Any

import torch

from megatron_dft.compat.hooks import wrap

_MODULE = "megatron.core.optimizer.optimizer"


def install() -> None:
    """Put the count where the loading optimizer reads it."""
    for owner in ("FP32Optimizer", "Float16OptimizerWithFloat16Params"):
        wrap(f"{_MODULE}:{owner}.load_state_dict", _placing)


def install_for_shards() -> None:
    """The same for the distributed optimizer over FusedAdam."""
    owner = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
    wrap(f"{owner}.load_state_dict", _rounding)


def _placing(original):
    def load_state_dict(self, state_dict):
        place_count(state_dict.get("optimizer", state_dict), self.optimizer)
        return original(self, state_dict)

    return load_state_dict


def _rounding(original):
    def load_state_dict(self, state_dict):
        if is_fused(self.optimizer):
            for group in state_dict["optimizer"]["param_groups"]:
                if group.get("step") is not None:
                    group["step"] = int(group["step"])
        with torch.no_grad():
            return original(self, state_dict)

    return load_state_dict


def is_fused(optimizer: Any) -> bool:
    """Whether this Adam counts in its parameter groups; told by its name, as its package may be
    absent."""
    return any(base.__name__ == "FusedAdam" for base in type(optimizer).__mro__)


def place_count(state: dict[str, Any], optimizer: Any) -> None:
    """Move the count of a loaded state dict, in place; none is there of an SGD or a fresh Adam.

    state: {"state": {…, "common_step"}, "param_groups"} as Megatron loads it.
    """
    groups, common = state["param_groups"], state["state"].pop("common_step", None)
    counts = {int(group.pop("step")) for group in groups if group.get("step") is not None}
    counts |= set() if common is None else {int(common)}
    if not counts:
        return
    # A group without parameters is not counted by every release of FusedAdam.
    count = max(counts)
    if is_fused(optimizer):
        for group in groups:
            group["step"] = count
    else:
        state["state"]["common_step"] = torch.tensor(float(count))
