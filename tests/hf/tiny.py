"""Tiny random Hugging Face models with a tokenizer and a chat template, written by transformers
itself.

Used by the tests of every area. The tokenizer knows the 256 bytes and three special tokens (259 in
all), so every text is encodable and no file has to be fetched.
"""

from pathlib import Path
from typing import Any

import torch

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 259

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DENSE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    # Large enough that a wrong norm, head order or rotary angle moves the logits visibly.
    initializer_range=0.15,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)
_DEEPSEEK = dict(
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=4,
    moe_intermediate_size=24,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    rms_norm_eps=1e-6,
    num_nextn_predict_layers=0,
)
# Windows narrower than the tests' sequences; soft caps that scores and logits reach.
_GEMMA: dict[str, Any] = dict(
    head_dim=16,
    query_pre_attn_scalar=24,
    sliding_window=7,
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
)
_GEMMA2 = dict(attn_logit_softcapping=1.5, final_logit_softcapping=4.0)
_GEMMA3 = dict(
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", rope_theta=5000.0, factor=8.0),
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
    ),
)

# kind -> (transformers' model type, what differs from _DENSE)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama3": (
        "llama",
        dict(rope_parameters=_LLAMA3_ROPE, head_dim=16, max_position_embeddings=16384),
    ),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=None)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3-yarn": ("qwen3", dict(head_dim=16, rope_parameters=_YARN)),
    "phi3": ("phi3", dict(original_max_position_embeddings=128)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": ("qwen2_moe", _EXPERTS | dict(shared_expert_intermediate_size=40)),
    "qwen3-moe": ("qwen3_moe", _EXPERTS | dict(norm_topk_prob=True, mlp_only_layers=[1])),
    "deepseek-v3": ("deepseek_v3", _DEEPSEEK),
    "gemma2": ("gemma2", _GEMMA | _GEMMA2),
    "gemma3": ("gemma3_text", _GEMMA | _GEMMA3),
}
MOE_KINDS = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3")


def tiny_tokenizer() -> Any:
    """A byte-level `PreTrainedTokenizerFast`: ids 0–255 are bytes, then pad, start, end (eos)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, START, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny(
    kind: str,
    directory: str | Path,
    *,
    seed: int = 1234,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny random model of `kind` (a key of KINDS), with tokenizer, into `directory`.

    `overrides` are fields of the Hugging Face config, e.g. `vocab_size=259, num_hidden_layers=2`.
    Norm weights and biases are random too: an import that loses them changes the logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    model_type, differs = KINDS[kind]
    settings = {**_DENSE, **differs, **overrides}
    if settings["vocab_size"] < VOCAB_SIZE:
        raise ValueError(f"make_tiny: vocab_size must be ≥ {VOCAB_SIZE} to hold the tokenizer")
    config = AutoConfig.for_model(model_type, **settings)
    config.eos_token_id, config.pad_token_id = VOCAB_SIZE - 1, VOCAB_SIZE - 3
    config.bos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0, 0.1)
    directory = Path(directory)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory
