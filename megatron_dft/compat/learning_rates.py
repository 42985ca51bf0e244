"""Resuming with another learning rate.

megatron-core 0.19.2 pairs the parameter groups of a checkpoint with those of the run by a key that
holds their learning rates (core/optimizer/optimizer.py, distrib_optimizer.py), so
--override-opt_param-scheduler with another --lr finds no group: ValueError or KeyError of a tuple.
"""

from collections.abc import Mapping
from typing import Any

from megatron_dft.compat.hooks import wrap

_RATES = ("max_lr", "min_lr")


def rename_on_load(rates: Mapping[str, Mapping[float, float]]) -> None:
    """Replace the learning rates of every parameter group that a checkpoint brings.

    rates: "max_lr" and "min_lr" → {rate of the checkpoint: rate of this run}.
    """

    def make(original):
        def _load_base_checkpoint(*args, **kwargs):
            state, *rest = original(*args, **kwargs)
            if isinstance(state, dict):
                _rename(state.get("optimizer"), rates)
            return state, *rest

        return _load_base_checkpoint

    wrap("megatron.training.checkpointing:_load_base_checkpoint", make)


def _rename(found: Any, rates: Mapping[str, Mapping[float, float]]) -> None:
    """Go down to the groups: a chain of optimizers nests them."""
    if isinstance(found, list):
        for one in found:
            _rename(one, rates)
    if not isinstance(found, dict):
        return
    for group in found.get("param_groups", ()):
        for name in _RATES:
            if group.get(name) in rates[name]:
                group[name] = rates[name][group[name]]
    for key, value in found.items():
        if key not in ("param_groups", "state"):
            _rename(value, rates)
