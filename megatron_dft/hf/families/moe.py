"""Mixture-of-experts families: Mixtral, Qwen2-MoE, Qwen3-MoE."""

from typing import Any

from megatron_dft.hf.families.base import LAYER, Family, Table, expect
from megatron_dft.hf.families.llama import LLAMA, QK_NORM, QKV_BIAS, no_attention_bias
from megatron_dft.hf.pieces import gated, replicated, row_parallel
from megatron_dft.hf.source import HFCheckpoint


def experts(router: str, gate: str, up: str, down: str) -> Table:
    """Router and experts; names after `model.layers.N.`, with `{expert}`."""
    return {
        "layer.mlp.router.weight": replicated(LAYER + router),
        "layer.mlp.experts.linear_fc1.weight": gated(LAYER + gate, LAYER + up),
        "layer.mlp.experts.linear_fc2.weight": row_parallel(LAYER + down),
    }


def without_dense_mlp(table: Table) -> Table:
    return {k: v for k, v in table.items() if not k.startswith("layer.mlp.")}


_QWEN_EXPERTS = experts(
    "mlp.gate.weight",
    "mlp.experts.{expert}.gate_proj.weight",
    "mlp.experts.{expert}.up_proj.weight",
    "mlp.experts.{expert}.down_proj.weight",
)
_SHARED = LAYER + "mlp.shared_expert"
_QWEN_SHARED_EXPERT: Table = {
    "layer.mlp.shared_experts.linear_fc1.weight": gated(
        _SHARED + ".gate_proj.weight", _SHARED + ".up_proj.weight"
    ),
    "layer.mlp.shared_experts.linear_fc2.weight": row_parallel(_SHARED + ".down_proj.weight"),
    "layer.mlp.shared_experts.gate_weight": replicated(_SHARED + "_gate.weight"),
}
_MIXTRAL_EXPERT = "block_sparse_moe.experts.{expert}."
MIXTRAL: Table = without_dense_mlp(LLAMA) | experts(
    "block_sparse_moe.gate.weight",
    _MIXTRAL_EXPERT + "w1.weight",
    _MIXTRAL_EXPERT + "w3.weight",
    _MIXTRAL_EXPERT + "w2.weight",
)


def routing(count: int, top_k: int, hidden: int, normalised: bool) -> dict[str, Any]:
    """Softmax routing; weights normalised over the chosen are a softmax after the choice."""
    return {
        "num_experts": count,
        "moe_router_topk": top_k,
        "moe_ffn_hidden_size": hidden,
        "moe_router_pre_softmax": not normalised,
        # Fine-tuning leaves the routing alone unless the user asks for a balancing loss.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _mixtral(checkpoint: HFCheckpoint) -> dict[str, Any]:
    c = checkpoint.settings
    expect(checkpoint, "router_jitter_noise", 0.0, "set --moe-input-jitter-eps yourself")
    return routing(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], True)


def _qwen_moe(checkpoint: HFCheckpoint) -> dict[str, Any]:
    c = checkpoint.settings
    step, dense = c["decoder_sparse_step"], c["mlp_only_layers"]
    sparse = [int(i not in dense and (i + 1) % step == 0) for i in range(c["num_hidden_layers"])]
    arguments = routing(
        c["num_experts"] if "num_experts" in c else c["num_local_experts"],
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        c["norm_topk_prob"],
    )
    return arguments | ({} if all(sparse) else {"moe_layer_freq": sparse})


def _qwen2_moe(checkpoint: HFCheckpoint) -> dict[str, Any]:
    c = checkpoint.settings
    return _qwen_moe(checkpoint) | {
        "add_qkv_bias": c["qkv_bias"],
        "moe_shared_expert_intermediate_size": c["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _qwen3_moe(checkpoint: HFCheckpoint) -> dict[str, Any]:
    no_attention_bias(checkpoint)
    return _qwen_moe(checkpoint) | {"qk_layernorm": True}


FAMILIES = {
    "MixtralForCausalLM": Family(MIXTRAL, _mixtral),
    "Qwen2MoeForCausalLM": Family(
        LLAMA | QKV_BIAS | _QWEN_EXPERTS | _QWEN_SHARED_EXPERT, _qwen2_moe
    ),
    "Qwen3MoeForCausalLM": Family(LLAMA | QK_NORM | _QWEN_EXPERTS, _qwen3_moe),
}
