"""The tables: which Hugging Face tensors make which Megatron parameter, one family after the other.

Keys are Megatron parameter names in one spelling for the TE, the local and the CPU layer specs (see
`names.py`), `layer.` standing for one decoder layer. `config.py` holds the other half of a family.
"""

from megatron_dft.hf.pieces import (
    Rule,
    gated,
    qkv,
    replicated,
    row_parallel,
    vocabulary,
)
from megatron_dft.hf.source import HFCheckpoint

Table = dict[str, Rule]

_L = "model.layers.{layer}."

LLAMA: Table = {
    "embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": replicated("model.norm.weight"),
    "layer.input_layernorm.weight": replicated(_L + "input_layernorm.weight"),
    "layer.self_attention.linear_qkv.weight": qkv(
        _L + "self_attn.q_proj.weight",
        _L + "self_attn.k_proj.weight",
        _L + "self_attn.v_proj.weight",
    ),
    "layer.self_attention.linear_proj.weight": row_parallel(_L + "self_attn.o_proj.weight"),
    "layer.pre_mlp_layernorm.weight": replicated(_L + "post_attention_layernorm.weight"),
    "layer.mlp.linear_fc1.weight": gated(_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"),
    "layer.mlp.linear_fc2.weight": row_parallel(_L + "mlp.down_proj.weight"),
}
QWEN2: Table = LLAMA | {
    "layer.self_attention.linear_qkv.bias": qkv(
        _L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"
    ),
}
QWEN3: Table = LLAMA | {
    "layer.self_attention.q_layernorm.weight": replicated(_L + "self_attn.q_norm.weight"),
    "layer.self_attention.k_layernorm.weight": replicated(_L + "self_attn.k_norm.weight"),
}

TABLES: dict[str, Table] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}

# Buffers that old checkpoints carry and every implementation recomputes from config.json.
_RECOMPUTED = (".rotary_emb.inv_freq",)
TIED_COPY = "lm_head.weight"  # present or not where the output layer is tied to the embedding


def optional_tensors(checkpoint: HFCheckpoint) -> set[str]:
    """Names in `checkpoint` that no parameter is made of, rightly; an export leaves them out."""
    names = {n for n in checkpoint.tensors if n.endswith(_RECOMPUTED)}
    return names | ({TIED_COPY} if checkpoint.settings["tie_word_embeddings"] else set())


def table_for(architecture: str, tied: bool) -> Table:
    """The table of `architecture`; with tied embeddings the output layer repeats the embedding.

    Raises ValueError for an architecture that no table covers.
    """
    if architecture not in TABLES:
        raise ValueError(
            f"architecture {architecture!r} is not mapped; mapped are {', '.join(sorted(TABLES))}"
        )
    table = TABLES[architecture]
    if tied:
        embedding = table["embedding.word_embeddings.weight"].names[0]
        table = table | {"output_layer.weight": vocabulary(embedding, is_copy=True)}
    return table
