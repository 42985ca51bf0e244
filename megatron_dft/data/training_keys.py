"""The keys of a message or a row that say whether, and how strongly, it trains.

Spellings of several tools are honoured: `train`, `training`, `trainable`, `do_train`,
`train_on_turn`, `loss`, `loss_mask` (true, false, 0 or 1) and `weight`, `loss_weight` (any number
from 0 on), whatever their case, hyphens or underscores. Several on one message all count: it trains
where none of them says no.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dft.data.conversation import RowError
from megatron_dft.data.row_values import shown

_SWITCHES = {"train", "training", "loss", "lossmask", "trainonturn", "dotrain", "trainable"}
_WEIGHTS = {"weight", "lossweight"}
_BY_CHARACTER = {"traindetail", "trainingdetail", "traindetails", "trainingdetails"}


def _plain(key: Any) -> str:
    return str(key).lower().replace("_", "").replace("-", "")


def is_training_key(key: Any) -> bool:
    """Whether a message's key is one of those that say how it trains."""
    return _plain(key) in _SWITCHES | _WEIGHTS | _BY_CHARACTER


def message_weight(message: Mapping[str, Any], where: str) -> tuple[float, bool]:
    """(factor on the loss, 0 where it does not train; whether any key asked for training).

    Raises RowError for values that say neither yes nor no, and for masks by character.
    """
    weight, asked = 1.0, False
    for key, value in message.items():
        plain = _plain(key)
        if value is None:
            continue
        if plain in _SWITCHES:
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise RowError(f"{where}: {key} must be true or false, not {shown(value)}")
            weight, asked = weight * float(value), asked or bool(value)
        elif plain in _WEIGHTS:
            number = _number(value, f"{where}: {key}")
            weight, asked = weight * number, asked or number > 0
        elif plain in _BY_CHARACTER and value != []:
            raise RowError(
                f"{where}: {key} masks by character, which is not supported; split the message or "
                "mask it whole"
            )
    return _single(weight, where), asked


def row_weight(row: Mapping[str, Any]) -> float:
    """The factor on the loss of the whole row; 1 where it has none."""
    found = [(k, v) for k, v in row.items() if v is not None and _plain(k) in _WEIGHTS]
    weight = 1.0
    for key, value in found:
        weight *= _number(value, f'"{key}"')
    return _single(weight, "the row")


def product(message: float, row: float, where: str) -> float:
    """Both factors together; RowError where fp32 cannot hold what is not 0."""
    weight = _single(message * row, where)
    if message and row and not weight:
        raise RowError(f"{where}: its weight {message * row} is above 0 and too small for fp32")
    return weight


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{where} must be a number of at least 0, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    single = _as_single(number)
    # Too small for fp32 would silently mean "does not train".
    if not 0 <= number < math.inf or single == math.inf or (number > 0 and single == 0):
        raise RowError(
            f"{where} must be a number of at least 0 that fp32 holds, not {shown(value)}"
        )
    return number


def _as_single(number: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(number))


def _single(weight: float, where: str) -> float:
    single = _as_single(weight)
    if abs(single) == math.inf or (weight != 0 and single == 0):
        raise RowError(f"{where}: the weights multiply to {weight}, which fp32 does not hold")
    return single
