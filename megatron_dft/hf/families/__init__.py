"""The architectures that megatron-dft maps itself, by the name in config.json's `architectures`."""

from megatron_dft.hf.families import deepseek, gemma, llama, moe
from megatron_dft.hf.families.base import Family, Table
from megatron_dft.hf.pieces import vocabulary
from megatron_dft.hf.source import HFCheckpoint

FAMILIES: dict[str, Family] = llama.FAMILIES | moe.FAMILIES | deepseek.FAMILIES | gemma.FAMILIES

# Known architectures that are not mapped, and why.
REFUSED: dict[str, str] = {
    "GemmaForCausalLM": "the first Gemma is not mapped, Gemma 2 and 3 are",
    "Gemma3ForConditionalGeneration": "it has an image encoder; give a text-only Gemma 3",
    "GptOssForCausalLM": "its experts are stored packed, interleaved and with biases, and their "
    "clamped activation is not Megatron's; the mapped mixtures are Mixtral, Qwen-MoE, DeepSeek-V3",
    "Llama4ForCausalLM": "Megatron lacks its chunked attention and layers without rotary "
    "embeddings",
    "Phi3SmallForCausalLM": "Megatron lacks its blocksparse attention",
}

# Endings of tensors that every model computes anew and transformers ignores in files, too.
_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".position_ids",
    ".masked_bias",
)
TIED_COPY = "lm_head.weight"  # present or not where the output layer is tied to the embedding


def family_of(checkpoint: HFCheckpoint) -> Family:
    """Raises ValueError for an architecture that is not mapped."""
    if checkpoint.architecture in REFUSED:
        raise ValueError(
            f"{checkpoint.path}: {checkpoint.architecture} is not supported: "
            f"{REFUSED[checkpoint.architecture]}"
        )
    if checkpoint.architecture not in FAMILIES:
        raise ValueError(
            f"{checkpoint.path}: architecture {checkpoint.architecture!r} is not mapped; mapped "
            "are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[checkpoint.architecture]


def table_of(checkpoint: HFCheckpoint) -> Table:
    """The family's table; with tied embeddings the output layer repeats the embedding."""
    table = family_of(checkpoint).weights
    if checkpoint.settings["tie_word_embeddings"]:
        embedding = table["embedding.word_embeddings.weight"].names[0]
        table = table | {"output_layer.weight": vocabulary(embedding, is_copy=True)}
    return table


def optional_tensors(checkpoint: HFCheckpoint) -> set[str]:
    """Names in `checkpoint` that no parameter is made of, rightly; an export leaves them out."""
    names = {n for n in checkpoint.tensors if n.endswith(_BUFFERS)}
    return names | ({TIED_COPY} if checkpoint.settings["tie_word_embeddings"] else set())
