"""The settings of a config.json that no model can have, before anything is computed from them."""

import math
from collections.abc import Iterator
from typing import Any

from megatron_dft.hf.source import HFCheckpoint

_LARGEST = 2**31 - 1
_MOST_POSITIONS = 2**27
# How many there are of something: at least one, where config.json has the setting.
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts",
    "decoder_sparse_step", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "n_group", "topk_group",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
# What an architecture has, it cannot have as null.
_NEVER_NULL = (
    *_REQUIRED, "v_head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "n_group",
    "topk_group", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
    "shared_expert_intermediate_size", "decoder_sparse_step",
)  # fmt: skip
_POSITIVE = (
    "rms_norm_eps", "routed_scaling_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
_SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "norm_topk_prob",
    "use_bidirectional_attention",
)  # fmt: skip
_ROPE = (
    "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip
# Kinds of rope that one factor scales.
_SCALED = ("linear", "llama3", "yarn")


def check_settings(checkpoint: HFCheckpoint) -> None:
    """Raise ValueError (one line) for the first setting that no model can have."""
    for key, value, expected in _wrong(checkpoint.settings):
        raise ValueError(
            f"{checkpoint.path}/config.json: {key}: expected {expected}, got {str(value)[:60]!r}"
        )


def _wrong(c: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(setting, value, what it should be) of all that are wrong."""
    for key in _SIZES:
        value = c.get(key)
        needed = key in _REQUIRED or (key in _NEVER_NULL and key in c)
        if (value is not None or needed) and not _is_size(value):
            yield key, value, f"a whole number from 1 to {_LARGEST}"
    if c["max_position_embeddings"] > _MOST_POSITIONS:
        yield "max_position_embeddings", c["max_position_embeddings"], f"at most {_MOST_POSITIONS}"
    for key in _POSITIVE:
        value = c.get(key)
        if (value is not None or key == "rms_norm_eps") and not _is_positive(value):
            yield key, value, "a number above 0"
    for key in _SWITCHES:
        if not isinstance(c.get(key), bool | None):
            yield key, c[key], "true or false"
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    if heads % groups:
        yield "num_key_value_heads", groups, f"a divisor of the {heads} attention heads"
    if not c.get("head_dim") and c["hidden_size"] % heads:
        yield "hidden_size", c["hidden_size"], f"a multiple of the {heads} attention heads"
    experts = next((c[k] for k in _EXPERTS if c.get(k)), None)
    if experts is not None and (c.get("num_experts_per_tok") or 0) > experts:
        yield "num_experts_per_tok", c["num_experts_per_tok"], f"at most the {experts} experts"
    layers = c["num_hidden_layers"]
    kinds = c.get("layer_types")
    if kinds is not None and not _is_list(kinds, str, layers):
        yield "layer_types", kinds, f"a word for each of the {layers} layers"
    window = c.get("sliding_window")
    if window is not None and not _is_size(window) and (window != 0 or _slides(kinds)):
        yield "sliding_window", window, "a number of tokens above 0"
    dense = c.get("mlp_only_layers")
    if "mlp_only_layers" in c and not (dense is None or _is_list(dense, int)):
        yield "mlp_only_layers", dense, "numbers of layers"
    first = c.get("first_k_dense_replace", 0)
    if type(first) is not int or not 0 <= first <= layers:
        yield "first_k_dense_replace", first, f"a number of the {layers} layers"
    yield from _wrong_rope("rope_parameters", c.get("rope_parameters"))


def _wrong_rope(where: str, rope: Any) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(rope, dict):
        yield where, rope, "a JSON object"
        return
    inner = {k: v for k, v in rope.items() if k.endswith("_attention")}  # one for a kind of layer
    for kind, value in inner.items():
        yield from _wrong_rope(f"{where}.{kind}", value)
    if inner:
        return
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str):
        yield f"{where}.rope_type", kind, "a word"
    # Other kinds are refused by name where the flags are made (config.py).
    needed = ("rope_theta", "factor") if kind in _SCALED else ("rope_theta",)
    for key in _ROPE:
        value = rope.get(key)
        if (value is not None or key in needed) and not _is_positive(value):
            yield f"{where}.{key}", value, "a number above 0"
    original = rope.get("original_max_position_embeddings")
    if original is not None and not (int(original) == original <= _MOST_POSITIONS):
        yield f"{where}.original_max_position_embeddings", original, "a number of positions"
    if (rope.get("partial_rotary_factor") or 1) > 1:
        yield f"{where}.partial_rotary_factor", rope["partial_rotary_factor"], "at most 1"
    for key in ("mscale", "mscale_all_dim"):
        if not (rope.get(key) is None or _is_number(rope[key])):
            yield f"{where}.{key}", rope[key], "a number"


def _slides(kinds: list[str] | None) -> bool:
    return kinds is None or "sliding_attention" in kinds


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 1e-30 < value < 1e30  # float32 keeps it a number above 0


def _is_list(value: Any, kind: type, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(type(v) is kind for v in value)
        and length in (None, len(value))
    )
