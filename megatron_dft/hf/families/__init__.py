"""The architectures that megatron-dft maps itself, by the name in config.json's `architectures`."""

from megatron_dft.hf.families import deepseek, llama, moe
from megatron_dft.hf.families.base import Family, Table
from megatron_dft.hf.pieces import vocabulary
from megatron_dft.hf.source import HFCheckpoint

FAMILIES: dict[str, Family] = llama.FAMILIES | moe.FAMILIES | deepseek.FAMILIES

# Known architectures that Megatron's GPTModel cannot represent, and what it lacks.
_SANDWICH = "norms after attention and MLP (post_*_layernorm) and scaled embeddings"
REFUSED: dict[str, str] = {
    "GemmaForCausalLM": "scaled embeddings",
    "Gemma2ForCausalLM": f"{_SANDWICH}, and soft-capped logits",
    "Gemma3ForCausalLM": f"{_SANDWICH}, and two rotary bases in one model",
    "Gemma3ForConditionalGeneration": "an image encoder",
    "GptOssForCausalLM": "packed, interleaved experts with biases are not mapped yet",
    "Llama4ForCausalLM": "chunked attention and layers without rotary embeddings",
    "Phi3SmallForCausalLM": "blocksparse attention",
}

TIED_COPY = "lm_head.weight"  # present or not where the output layer is tied to the embedding


def family_of(checkpoint: HFCheckpoint) -> Family:
    """Raises ValueError for an architecture that is not mapped."""
    if checkpoint.architecture in REFUSED:
        raise ValueError(
            f"{checkpoint.path}: {checkpoint.architecture} cannot be represented by Megatron's "
            f"GPTModel: {REFUSED[checkpoint.architecture]}"
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
    unmapped = family_of(checkpoint).unmapped
    names = {n for n in checkpoint.tensors if unmapped and n.endswith(unmapped)}
    return names | ({TIED_COPY} if checkpoint.settings["tie_word_embeddings"] else set())
