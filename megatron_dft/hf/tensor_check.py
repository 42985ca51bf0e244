"""config.json against the tensors' names and shapes, before a model is built from it.

A model of as many layers as config.json says takes memory and time; whether the files hold them is
known from their headers.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron_dft.hf.families.base import LAYER, Family
from megatron_dft.hf.source import HFCheckpoint


def check_tensors(checkpoint: HFCheckpoint, family: Family, arguments: dict[str, Any]) -> None:
    """Raise ValueError unless there are tensors for all layers and experts that config.json says,
    in the shapes that Megatron's `arguments` imply."""
    if not checkpoint.tensors:  # config.json alone: nothing is read or built
        return
    layers, experts = _counts(checkpoint, family)
    for what, said, found in (
        ("num_hidden_layers", arguments["num_layers"], layers),
        ("experts", arguments.get("num_experts") or 0, experts),
    ):
        if said > found:
            raise ValueError(
                f"{checkpoint.path}: config.json says {said} {what}, the tensors are of {found}; "
                "the one or the other is of another model, or files are missing"
            )
    for name, expected in _implied(family, arguments):
        info = checkpoint.tensors.get(name)  # one that is missing is named when it is read
        if info is not None and info.shape != expected:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(info.shape)}, but config.json "
                f"and the model flags imply {list(expected)}"
            )


def _implied(family: Family, a: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of what costs memory."""
    hidden, width = a["hidden_size"], a["kv_channels"]
    queries, keys = a["num_attention_heads"] * width, a["num_query_groups"] * width
    ffn, expert = a["ffn_hidden_size"], a.get("moe_ffn_hidden_size", 0)
    shared = a.get("moe_shared_expert_intermediate_size", 0)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "embedding.word_embeddings.weight": [(a["vocab_size"], hidden)],
        "layer.mlp.linear_fc1.weight": [(ffn, hidden)] * 2,
        "layer.mlp.linear_fc2.weight": [(hidden, ffn)],
        "layer.mlp.experts.linear_fc1.weight": [(expert, hidden)] * 2,
        "layer.mlp.experts.linear_fc2.weight": [(hidden, expert)],
        "layer.mlp.shared_experts.linear_fc1.weight": [(shared, hidden)] * 2,
        "layer.mlp.shared_experts.linear_fc2.weight": [(hidden, shared)],
    }
    if a.get("multi_latent_attention"):
        shapes |= _latent(a)
    else:
        shapes["layer.self_attention.linear_qkv.weight"] = [
            (queries, hidden), (keys, hidden), (keys, hidden)
        ]  # fmt: skip
        shapes["layer.self_attention.linear_proj.weight"] = [(hidden, queries)]
    for key, parts in shapes.items():
        names = family.weights[key].names if key in family.weights else ()
        if names and len(names) < len(parts):  # packed: all their rows in one tensor
            parts = [(sum(rows for rows, *_ in parts), hidden)]
        for template, shape in zip(names, parts, strict=True) if names else ():
            for layer in range(a["num_layers"] if "{layer}" in template else 1):
                yield template.format(layer=layer, expert=0), shape


def _latent(a: dict[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    heads, hidden, rank = a["num_attention_heads"], a["hidden_size"], a["kv_lora_rank"]
    position, values = a["qk_pos_emb_head_dim"], heads * a["v_head_dim"]
    own, queries = heads * a["qk_head_dim"], heads * (a["qk_head_dim"] + position)
    layer = "layer.self_attention."
    down = a["q_lora_rank"]
    return {
        f"{layer}linear_q_proj.weight": [(queries, hidden)],
        f"{layer}linear_q_down_proj.weight": [(down, hidden)],
        f"{layer}linear_q_up_proj.weight": [(queries, down)],
        f"{layer}linear_kv_down_proj.weight": [(rank + position, hidden)],
        f"{layer}linear_kv_up_proj.weight": [(own + values, rank)],
        f"{layer}linear_proj.weight": [(hidden, values)],
    }


def _counts(checkpoint: HFCheckpoint, family: Family) -> tuple[int, int]:
    """One more than the largest number of a layer, and of an expert, in the names."""
    rules = [name for rule in family.weights.values() for name in rule.names]
    endings = {name.removeprefix(LAYER) for name in rules if "{expert}" in name}
    patterns = [re.escape(e).replace(r"\{expert\}", r"(\d{1,9})") for e in endings]
    expert = re.compile("|".join(patterns)) if patterns else None
    layer = re.compile(re.escape(LAYER).replace(r"\{layer\}", r"(\d{1,9})") + "(.+)")
    layers = experts = 0
    for name in checkpoint.tensors:
        match = layer.fullmatch(name)
        if match is None:
            continue
        layers = max(layers, int(match[1]) + 1)
        found = expert.fullmatch(match[2]) if expert else None
        if found is not None:
            experts = max(experts, int(next(g for g in found.groups() if g)) + 1)
    return layers, experts
