"""Where a tensor sits in a transformer, read from its name: layer number and module type.

The names are Hugging Face's (many families) and Megatron's torch_dist keys; both are tables of
patterns, first match wins, so a new family is a new line.
"""

import re

# Types in the order in which reports show them.
MODULE_TYPES = (
    "embed",
    "q",
    "k",
    "v",
    "qkv",
    "o",
    "router",
    "gate",
    "up",
    "gate_up",
    "down",
    "norm",
    "head",
    "other",
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")

# The norms come first: Megatron fuses a layer norm's weight into the linear layer behind it
# (`linear_qkv.layer_norm_weight`), and it is a norm all the same.
_TYPES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("norm", r"norm|(?:^|\.)ln_?\w*\.(?:weight|bias)$"),
        ("embed", r"(?:^|\.)(?:embed_tokens|word_embeddings|wte|wpe|embed_in|tok_embeddings)\."),
        ("embed", r"(?:^|\.)position_embeddings\."),
        ("head", r"(?:^|\.)(?:lm_head|output_layer|embed_out)\."),
        ("qkv", r"\.(?:linear_qkv|qkv_proj|query_key_value|W_pack|c_attn|wqkv|Wqkv)\."),
        ("q", r"\.(?:q_proj|q_a_proj|q_b_proj|wq|linear_q(?:_\w+)?)\."),
        ("k", r"\.(?:k_proj|wk)\."),
        ("v", r"\.(?:v_proj|wv)\."),
        ("o", r"\.(?:o_proj|out_proj|linear_proj|wo)\.|attn\.c_proj\.|attention\.dense\."),
        ("router", r"\.(?:router|gate)\.(?:weight|bias|expert_bias)$"),
        ("gate_up", r"\.(?:gate_up_proj|linear_fc1)(?:\.|$)"),
        ("gate", r"\.(?:gate_proj|w1)\."),
        ("up", r"\.(?:up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h)\."),
        ("down", r"\.(?:down_proj|linear_fc2|w2|fc2|fc_out|c_proj|dense_4h_to_h)(?:\.|$)"),
    )
)

# Not weights: tables and masks that some old checkpoints carry along.
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|position_ids|masked_bias|attn\.bias|_extra_state\w*)$")


def layer_of(name: str) -> int | None:
    """The transformer layer a tensor belongs to, counted from 0; None outside the layers."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def module_type(name: str) -> str:
    """One of `MODULE_TYPES`; a bias counts as part of its module."""
    return next((kind for kind, pattern in _TYPES if pattern.search(name)), "other")


def is_buffer(name: str) -> bool:
    """True for stored tensors that no training changes (rotary tables, masks)."""
    return _BUFFER.search(name) is not None


def report_order(name: str) -> tuple[int, int, str]:
    """Sort key: embeddings, the layers (inside one: `MODULE_TYPES` order), final norm, head."""
    layer, kind = layer_of(name), module_type(name)
    if layer is None:
        layer = -1 if kind == "embed" else 1 << 30
    return layer, MODULE_TYPES.index(kind), name
