"""Dense families: Llama (SmolLM2, Yi, DeepSeek-Math, …), Mistral, Qwen2/2.5, Qwen3, Phi-3/4."""

from typing import Any

from megatron_dft.hf.families.base import LAYER, Family, Table, expect
from megatron_dft.hf.pieces import (
    gated,
    packed_gated,
    packed_qkv,
    qkv,
    replicated,
    row_parallel,
    vocabulary,
)
from megatron_dft.hf.source import HFCheckpoint

_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."

LLAMA: Table = {
    "embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": replicated("model.norm.weight"),
    "layer.input_layernorm.weight": replicated(LAYER + "input_layernorm.weight"),
    "layer.self_attention.linear_qkv.weight": qkv(
        _ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"
    ),
    "layer.self_attention.linear_proj.weight": row_parallel(_ATTENTION + "o_proj.weight"),
    "layer.pre_mlp_layernorm.weight": replicated(LAYER + "post_attention_layernorm.weight"),
    "layer.mlp.linear_fc1.weight": gated(_MLP + "gate_proj.weight", _MLP + "up_proj.weight"),
    "layer.mlp.linear_fc2.weight": row_parallel(_MLP + "down_proj.weight"),
}
QKV_BIAS: Table = {
    "layer.self_attention.linear_qkv.bias": qkv(
        _ATTENTION + "q_proj.bias", _ATTENTION + "k_proj.bias", _ATTENTION + "v_proj.bias"
    ),
}
QK_NORM: Table = {
    "layer.self_attention.q_layernorm.weight": replicated(_ATTENTION + "q_norm.weight"),
    "layer.self_attention.k_layernorm.weight": replicated(_ATTENTION + "k_norm.weight"),
}
PHI3: Table = LLAMA | {
    "layer.self_attention.linear_qkv.weight": packed_qkv(_ATTENTION + "qkv_proj.weight"),
    "layer.mlp.linear_fc1.weight": packed_gated(_MLP + "gate_up_proj.weight"),
}


def _llama(checkpoint: HFCheckpoint) -> dict[str, Any]:
    no_attention_bias(checkpoint)
    expect(checkpoint, "mlp_bias", False, "Megatron has no bias on the MLP alone")
    return {}


def no_attention_bias(checkpoint: HFCheckpoint) -> None:
    expect(checkpoint, "attention_bias", False, "Megatron has no bias on q, k, v and o alone")


def _qwen2(checkpoint: HFCheckpoint) -> dict[str, Any]:
    return {"add_qkv_bias": True}


def _qwen3(checkpoint: HFCheckpoint) -> dict[str, Any]:
    no_attention_bias(checkpoint)
    return {"qk_layernorm": True}


def _phi3(checkpoint: HFCheckpoint) -> dict[str, Any]:
    return {}


FAMILIES = {
    "LlamaForCausalLM": Family(LLAMA, _llama),
    "MistralForCausalLM": Family(LLAMA, _llama),
    "Qwen2ForCausalLM": Family(LLAMA | QKV_BIAS, _qwen2),
    "Qwen3ForCausalLM": Family(LLAMA | QK_NORM, _qwen3),
    "Phi3ForCausalLM": Family(PHI3, _phi3),
}
