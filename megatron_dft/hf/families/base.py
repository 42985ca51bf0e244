"""What a family is: its table of weights and what its config.json adds to Megatron's arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dft.hf.pieces import Rule
from megatron_dft.hf.source import HFCheckpoint

# Keys are Megatron parameter names in one spelling for the TE, the local and the CPU layer specs
# (see `parameters.py`), `layer.` standing for one decoder layer; the rules' names are Hugging
# Face's.
Table = dict[str, Rule]

LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    weights    Megatron parameter -> Hugging Face tensors
    arguments  what differs from `config.COMMON` for a checkpoint; refuses what Megatron lacks
    unmapped   endings of tensor names that an import leaves out on purpose
    """

    weights: Table
    arguments: Callable[[HFCheckpoint], dict[str, Any]]
    unmapped: tuple[str, ...] = ()


def refuse(checkpoint: HFCheckpoint, key: str, value: Any, why: str) -> ValueError:
    return ValueError(
        f"{checkpoint.path}/config.json: {key} {value!r} cannot be represented; {why}"
    )


def expect(checkpoint: HFCheckpoint, key: str, wanted: Any, why: str) -> None:
    """Raise ValueError unless setting `key` has the one value that Megatron can represent."""
    value = checkpoint.settings.get(key, wanted)
    if value != wanted:
        raise refuse(checkpoint, key, value, f"only {wanted!r} can ({why})")
