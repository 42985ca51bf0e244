"""DeepSeek-V3: latent attention, sigmoid routing with a selection bias, shared experts."""

from typing import Any

from megatron_dft.hf.families.base import LAYER, Family, Table, expect, refuse
from megatron_dft.hf.families.llama import LLAMA
from megatron_dft.hf.families.moe import experts
from megatron_dft.hf.pieces import (
    column_or_replicated,
    column_parallel,
    gated,
    replicated,
    row_parallel,
)
from megatron_dft.hf.source import HFCheckpoint

_ATTENTION = LAYER + "self_attn."
_SHARED = LAYER + "mlp.shared_experts."

# Heads keep their order and are not interleaved with each other: plain row slices everywhere.
_LATENT_ATTENTION: Table = {
    "layer.self_attention.linear_q_proj.weight": column_parallel(_ATTENTION + "q_proj.weight"),
    "layer.self_attention.linear_q_down_proj.weight": column_or_replicated(
        _ATTENTION + "q_a_proj.weight"
    ),
    "layer.self_attention.q_layernorm.weight": replicated(_ATTENTION + "q_a_layernorm.weight"),
    "layer.self_attention.linear_q_up_proj.weight": column_parallel(_ATTENTION + "q_b_proj.weight"),
    "layer.self_attention.linear_kv_down_proj.weight": column_or_replicated(
        _ATTENTION + "kv_a_proj_with_mqa.weight"
    ),
    "layer.self_attention.kv_layernorm.weight": replicated(_ATTENTION + "kv_a_layernorm.weight"),
    "layer.self_attention.linear_kv_up_proj.weight": column_parallel(
        _ATTENTION + "kv_b_proj.weight"
    ),
}
DEEPSEEK_V3: Table = (
    {k: v for k, v in LLAMA.items() if k != "layer.self_attention.linear_qkv.weight"}
    | _LATENT_ATTENTION
    | experts(
        "mlp.gate.weight",
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
        "mlp.experts.{expert}.down_proj.weight",
    )
    | {
        "layer.mlp.router.expert_bias": replicated(LAYER + "mlp.gate.e_score_correction_bias"),
        "layer.mlp.shared_experts.linear_fc1.weight": gated(
            _SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"
        ),
        "layer.mlp.shared_experts.linear_fc2.weight": row_parallel(_SHARED + "down_proj.weight"),
    }
)


def _deepseek_v3(checkpoint: HFCheckpoint) -> dict[str, Any]:
    c = checkpoint.settings
    expect(checkpoint, "attention_bias", False, "Megatron's latent attention has no bias")
    expect(checkpoint, "rope_interleave", True, "Megatron's latent attention interleaves")
    expect(checkpoint, "rms_norm_eps", 1e-6, "transformers' latent norms use it whatever it is")
    expect(checkpoint, "norm_topk_prob", True, "Megatron normalises sigmoid scores")
    if c["n_group"] > 1 and c["num_experts_per_tok"] != 2 * c["topk_group"]:
        raise refuse(
            checkpoint, "topk_group", c["topk_group"], "num_experts_per_tok must be twice as many"
        )
    if c["q_lora_rank"] is None:
        raise refuse(
            checkpoint,
            "q_lora_rank",
            None,
            "Megatron's latent attention with norms wants latent queries too; models with a rank "
            "(DeepSeek-V3, R1) can be trained",
        )
    layers, dense = c["num_hidden_layers"], c["first_k_dense_replace"]
    return _latent_rope(checkpoint) | {
        "multi_latent_attention": True,
        "q_lora_rank": c["q_lora_rank"],
        "kv_lora_rank": c["kv_lora_rank"],
        "qk_head_dim": c["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": c["qk_rope_head_dim"],
        "v_head_dim": c["v_head_dim"],
        "kv_channels": c["v_head_dim"],
        "qk_layernorm": True,
        "num_experts": c["n_routed_experts"] if "n_routed_experts" in c else c["num_local_experts"],
        "moe_router_topk": c["num_experts_per_tok"],
        "moe_ffn_hidden_size": c["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": c["n_shared_experts"] * c["moe_intermediate_size"],
        "moe_layer_freq": [int(i >= dense) for i in range(layers)],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": c["n_group"] if c["n_group"] > 1 else None,
        "moe_router_group_topk": c["topk_group"] if c["n_group"] > 1 else None,
        "moe_router_topk_scaling_factor": c["routed_scaling_factor"],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.0,  # fine-tuning leaves the selection bias alone
    }


def _latent_rope(checkpoint: HFCheckpoint) -> dict[str, Any]:
    rope = checkpoint.settings["rope_parameters"]
    kind = rope.get("rope_type", "default")
    arguments: dict[str, Any] = {
        "position_embedding_type": "rope",
        "apply_rope_fusion": False,
        "rotary_base": rope["rope_theta"],
        "rotary_percent": 1.0,
    }
    if kind == "default":
        return arguments | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    if kind != "yarn":
        raise refuse(checkpoint, "rope_type", kind, "supported here are default and yarn")
    # No argument sets these three; Megatron's latent attention has them fixed.
    fixed = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    for key, value in fixed.items():
        if rope.get(key, value) != value:
            raise refuse(checkpoint, key, rope[key], f"Megatron hard-codes {value}")
    return arguments | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
    }


FAMILIES = {"DeepseekV3ForCausalLM": Family(DEEPSEEK_V3, _deepseek_v3)}
