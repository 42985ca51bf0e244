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
class OwnLayers:
    """What `gemma_layers.py` adds to Megatron's layers; None: nothing of the kind.

    embedding_scale    factor of the embedding's output
    softmax_scale      factor of the attention scores
    attention_softcap  c of c · tanh(score / c), before the mask
    logit_softcap      the same of the logits
    local_rotary_base  rotary base of the local layers, without position scaling
    local_layers       which layers are local, from the first
    position_factor    by which the other layers' positions are divided
    """

    embedding_scale: float
    softmax_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    local_rotary_base: float | None
    local_layers: tuple[bool, ...]
    position_factor: float

    def is_local(self, layer_number: int) -> bool:
        """layer_number counts from 1, as Megatron's does."""
        return self.local_layers[layer_number - 1]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    weights    Megatron parameter -> Hugging Face tensors
    arguments  what `config.megatron_args` adds for a checkpoint; refuses what Megatron lacks
    activation the one `hidden_act` there is
    own_layers what Megatron's arguments cannot say
    """

    weights: Table
    arguments: Callable[[HFCheckpoint], dict[str, Any]]
    activation: str = "silu"
    own_layers: Callable[[HFCheckpoint], OwnLayers] | None = None


def refuse(checkpoint: HFCheckpoint, key: str, value: Any, why: str) -> ValueError:
    return ValueError(
        f"{checkpoint.path}/config.json: {key} {value!r} cannot be represented; {why}"
    )


def expect(checkpoint: HFCheckpoint, key: str, wanted: Any, why: str) -> None:
    """Raise ValueError unless setting `key` has the one value that Megatron can represent."""
    value = checkpoint.settings.get(key, wanted)
    if value != wanted:
        raise refuse(checkpoint, key, value, f"only {wanted!r} can ({why})")
