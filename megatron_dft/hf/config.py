"""Hugging Face config.json -> Megatron's arguments, or a refusal that names what Megatron lacks.

Keys are argparse destinations of Megatron 0.19 (`vars(parse_args())`), values what a user would
have had to type. Reads `HFCheckpoint.settings`, where transformers has filled in its defaults.
"""

from typing import Any

from megatron_dft.hf.config_check import check_settings
from megatron_dft.hf.families import family_of
from megatron_dft.hf.families.base import OwnLayers, expect, refuse
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.hf.tensor_check import check_tensors

# Arguments about training, not about the architecture: an explicit flag of the user wins here,
# while one that contradicts any other argument is an error.
TRAINING_DEFAULTS = frozenset(
    {
        "attention_dropout",
        "hidden_dropout",
        "max_position_embeddings",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_router_bias_update_rate",
    }
)

# Megatron hard-codes these constants of llama3's rope scaling; only the factor is an argument.
_LLAMA3_FIXED = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def megatron_args(checkpoint: HFCheckpoint) -> dict[str, Any]:
    """Megatron argument destination -> value for `checkpoint`; see `apply_to_model_config` as well.

    Raises ValueError naming the architecture or the setting that Megatron 0.19 cannot represent, or
    that the tensors contradict.

    >>> megatron_args(open_checkpoint("Qwen/Qwen2.5-0.5B"))["add_qkv_bias"]  # doctest: +SKIP
    True
    """
    family = family_of(checkpoint)
    check_settings(checkpoint)
    c = checkpoint.settings
    expect(checkpoint, "hidden_act", family.activation, "the architecture's own")
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    arguments: dict[str, Any] = {
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": c.get("head_dim") or c["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": c["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not c["tie_word_embeddings"],
        "vocab_size": c["vocab_size"],
        "max_position_embeddings": c["max_position_embeddings"],
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    own = family.arguments(checkpoint)
    if not {"rope_type", "rotary_base"} & own.keys():  # the family knows its own
        arguments |= _rope(checkpoint)
    arguments |= _window(checkpoint) | own
    check_tensors(checkpoint, family, arguments)
    return arguments


def apply_to_model_config(model_config: Any, checkpoint: HFCheckpoint) -> None:
    """Set on Megatron's GPTModelConfig what its `gpt_config_from_args` drops on the way.

    0.19 reads `--use-rope-scaling` but not `--rope-scaling-factor`, so every Llama 3.x would get
    factor 8. The config's layer spec, if it is not Megatron's default, must have been set: layers
    that Megatron lacks (`own_layers`) are hung into it.
    """
    arguments = megatron_args(checkpoint)
    if arguments.get("use_rope_scaling"):
        model_config.rope_scaling_factor = arguments["rope_scaling_factor"]
    own = own_layers(checkpoint)
    if own is not None:
        from megatron_dft.hf.families import gemma_layers

        gemma_layers.apply(model_config, own)


def own_layers(checkpoint: HFCheckpoint) -> OwnLayers | None:
    """What the architecture needs beyond Megatron's layers; None for most."""
    make = family_of(checkpoint).own_layers
    return None if make is None else make(checkpoint)


def _rope(checkpoint: HFCheckpoint) -> dict[str, Any]:
    rope = checkpoint.settings["rope_parameters"]
    kind = rope.get("rope_type", "default")
    arguments: dict[str, Any] = {
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
    }
    if kind == "default":
        return arguments
    if kind == "yarn":
        return arguments | _yarn(checkpoint, rope)
    if kind == "linear":
        return arguments | {"rotary_seq_len_interpolation_factor": rope["factor"]}
    if kind == "llama3":
        for key, fixed in _LLAMA3_FIXED.items():
            if rope[key] != fixed:
                raise ValueError(
                    f"{checkpoint.path}/config.json: rope scaling 'llama3' with {key} {rope[key]}; "
                    f"Megatron hard-codes {fixed}, and the logits would be wrong without a word"
                )
        return arguments | {"use_rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise refuse(checkpoint, "rope_type", kind, "supported are default, linear, llama3, yarn")


def _yarn(checkpoint: HFCheckpoint, rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("attention_factor") is not None:
        raise refuse(
            checkpoint,
            "attention_factor",
            rope["attention_factor"],
            "Megatron derives it from the factor and mscale",
        )
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
        # transformers uses the two only together; otherwise 0.1 ln(factor) + 1.
        "mscale": rope["mscale"] if both else 1.0,
        "mscale_all_dim": rope["mscale_all_dim"] if both else 0.0,
    }


def _window(checkpoint: HFCheckpoint) -> dict[str, Any]:
    """Sliding window: in transformers a token sees `sliding_window` keys, its own included."""
    c = checkpoint.settings
    window, kinds = c.get("sliding_window"), c.get("layer_types")
    if window is None or window >= c["max_position_embeddings"]:
        return {}
    if kinds is not None and "sliding_attention" not in kinds:
        return {}
    arguments: dict[str, Any] = {"window_size": (window - 1, 0)}
    if kinds is not None and "full_attention" in kinds:
        arguments["window_attn_skip_freq"] = [int(k == "sliding_attention") for k in kinds]
    return arguments
