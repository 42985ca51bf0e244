"""Gemma 2 and 3 (text): sandwich norms, scaled embedding, windows, soft caps.

Megatron's arguments know none of these: `own_layers` hands them to `gemma_layers.py`.
"""

from typing import Any

from megatron_dft.hf.families.base import LAYER, Family, OwnLayers, Table, expect, refuse
from megatron_dft.hf.families.llama import LLAMA, QK_NORM, no_attention_bias
from megatron_dft.hf.pieces import replicated
from megatron_dft.hf.source import HFCheckpoint

_ACTIVATION = "gelu_pytorch_tanh"

GEMMA2: Table = LLAMA | {
    "layer.self_attention.linear_proj.post_layernorm.weight": replicated(
        LAYER + "post_attention_layernorm.weight"
    ),
    "layer.pre_mlp_layernorm.weight": replicated(LAYER + "pre_feedforward_layernorm.weight"),
    "layer.mlp.linear_fc2.post_layernorm.weight": replicated(
        LAYER + "post_feedforward_layernorm.weight"
    ),
}


def _own_layers(
    checkpoint: HFCheckpoint, local_base: float | None, position_factor: float
) -> OwnLayers:
    c = checkpoint.settings
    return OwnLayers(
        embedding_scale=c["hidden_size"] ** 0.5,
        softmax_scale=c["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=c["attn_logit_softcapping"],
        logit_softcap=c["final_logit_softcapping"],
        local_rotary_base=local_base,
        local_layers=tuple(k == "sliding_attention" for k in c["layer_types"]),
        position_factor=position_factor,
    )


def _common(checkpoint: HFCheckpoint) -> None:
    no_attention_bias(checkpoint)
    expect(checkpoint, "hidden_activation", _ACTIVATION, "Gemma's own")
    if checkpoint.settings["use_bidirectional_attention"]:
        raise refuse(checkpoint, "use_bidirectional_attention", True, "attention is causal here")


def _gemma2(checkpoint: HFCheckpoint) -> dict[str, Any]:
    _common(checkpoint)
    return {}


def _gemma2_layers(checkpoint: HFCheckpoint) -> OwnLayers:
    return _own_layers(checkpoint, None, 1.0)


def _gemma3(checkpoint: HFCheckpoint) -> dict[str, Any]:
    _common(checkpoint)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        expect(checkpoint, key, None, "Gemma 3 has no soft caps")
    expect_default_rope(checkpoint)
    _, arguments = _global_rope(checkpoint)
    return {"qk_layernorm": True} | arguments


def expect_default_rope(checkpoint: HFCheckpoint) -> None:
    local = checkpoint.settings["rope_parameters"]["sliding_attention"]
    if local["rope_type"] != "default":
        raise refuse(
            checkpoint, "rope_type", local["rope_type"], "layers with a window take the default"
        )


def _global_rope(checkpoint: HFCheckpoint) -> tuple[float, dict[str, Any]]:
    """Factor of linear scaling, and Megatron's arguments for the layers without a window."""
    rope = checkpoint.settings["rope_parameters"]["full_attention"]
    kind, factor = rope["rope_type"], 1.0
    arguments = {"rotary_base": rope["rope_theta"], "rotary_percent": 1.0}
    if kind == "linear":
        factor = rope["factor"]
        arguments["rotary_seq_len_interpolation_factor"] = factor
    elif kind != "default":
        raise refuse(checkpoint, "rope_type", kind, "Gemma 3 has default or linear")
    return factor, arguments


def _gemma3_layers(checkpoint: HFCheckpoint) -> OwnLayers:
    local = checkpoint.settings["rope_parameters"]["sliding_attention"]
    return _own_layers(checkpoint, local["rope_theta"], _global_rope(checkpoint)[0])


FAMILIES = {
    "Gemma2ForCausalLM": Family(GEMMA2, _gemma2, activation=_ACTIVATION, own_layers=_gemma2_layers),
    "Gemma3ForCausalLM": Family(
        GEMMA2 | QK_NORM, _gemma3, activation=_ACTIVATION, own_layers=_gemma3_layers
    ),
}
