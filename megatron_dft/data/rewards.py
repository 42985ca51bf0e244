"""A row's reward, as `verify` writes it: a factor on its loss, or what an objective weighs by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_dft.data.conversation import RowError
from megatron_dft.data.row_values import kind_of, shown
from megatron_dft.data.spec import RowKind


def reward_of(row: Mapping[str, Any], kind: RowKind) -> float:
    """The row's reward; 0 where nothing is to be learned from it.

    Under "weighted" it is at least 0. Under "rewarded" it has a sign, and a reward of 0, which is
    what a wrong answer gets, counts as `kind.wrong_reward`.

    Raises RowError for a reward that is missing, no finite number, or of a sign that does not fit.
    """
    value = row.get("reward")
    if value is None:
        raise RowError('the row has no "reward"')
    if not isinstance(value, bool | int | float):
        raise RowError(f'"reward" must be a number, not {kind_of(value)}')
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise RowError(f'"reward" must be a finite number, not {shown(value)}')
    if kind.name == "weighted" and reward < 0:
        raise RowError(
            f'"reward" is {shown(value)}: a weight has no sign, --loss rift takes negative ones'
        )
    return reward or kind.wrong_reward
