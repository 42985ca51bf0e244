"""One set of torch_dist keys for the local and the Transformer Engine layer specs."""

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

_FUSED = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def with_te_keys(spec: Any, config: Any) -> Any:
    """Give a local layer (or block) spec the keys of the Transformer Engine spec; changes it.

    config: the TransformerConfig or GPTModelConfig it was made for. Megatron's local spec files an
    experts' layer norm under the key of a dense layer's fused norm, and has no keys of fused norms
    for latent attention: a checkpoint would load "successfully" without those norms.
    """
    for layer in getattr(spec, "layer_specs", [spec]):
        mlp, keys = layer.submodules.mlp, layer.submodules.sharded_state_dict_keys_map
        module = getattr(mlp, "func", mlp)
        is_moe = getattr(module, "__self__", module) is MoELayer
        if config.multi_latent_attention:
            keys.update(_FUSED)
            if not is_moe:
                keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        elif is_moe:
            keys.pop("pre_mlp_layernorm.", None)
    return spec
