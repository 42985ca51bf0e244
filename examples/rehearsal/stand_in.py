"""A model of a configuration's family, a hundred thousand random weights, and rows to train on.

    python examples/rehearsal/stand_in.py Qwen/Qwen2.5-Math-7B --out runs/rehearsal/stand-in

NAME is the configuration's --hf-model: a name below, a directory, or a model whose config.json the
hub or its cache has. Its architecture stays, its sizes shrink, and bytes with the family's special
tokens are its vocabulary. Writes OUT/model and OUT/rows.jsonl.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# What a family's config.json says beside sizes; a rehearsal needs no network.
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5": {"model_type": "qwen2"},
    "Qwen/Qwen2.5-Math-1.5B": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen/Qwen3-30B-A3B": {"model_type": "qwen3_moe"},
    "meta-llama/Llama-3.1": {"model_type": "llama", "rope_parameters": _LLAMA_3_ROPE},
    "deepseek-ai/deepseek-math": {"model_type": "llama"},
}
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "head_dim": 16,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 16384,
}  # fmt: skip

# (beginning of text or None, end of text, other special tokens, has a chat template)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def family(name: str) -> dict[str, Any]:
    """The entries of config.json that make the architecture, of the longest name that fits."""
    known = [start for start in FAMILIES if name.startswith(start)]
    if known:
        return FAMILIES[max(known, key=len)]
    return AutoConfig.from_pretrained(name).to_dict()


def small_config(name: str) -> Any:
    """Its config.json with small sizes, those that the family has."""
    config = AutoConfig.for_model(**family(name))
    for key, value in SIZES.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: SIZES["num_hidden_layers"]]
    return config


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes, with the family's special tokens; a base model without a template has none here."""
    begin, end, more, template = None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"), _CHATML
    if "llama-3" in name.lower():
        begin, end, more = "<|begin_of_text|>", "<|end_of_text|>", _LLAMA_3
        if name.endswith("-Instruct"):
            end = "<|eot_id|>"
            template = (
                Path(__file__).parents[1] / "configs" / "templates" / "llama-3.jinja"
            ).read_text()
        else:
            template = None
    elif "deepseek-math" in name:
        begin, end, more, template = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", (), None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted({t for t in (begin, end, *more) if t}))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, chat_template=template
    )


def rows(number: int) -> list[dict[str, Any]]:
    """Sums as conversations."""
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(number)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
            ]
        }
        for a, b in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="the configuration's --hf-model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    config, words = small_config(args.name), tokenizer(args.name)
    config.vocab_size, config.eos_token_id = len(words), words.eos_token_id
    config.bos_token_id, config.pad_token_id = words.bos_token_id, words.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(args.out / "model")
    words.save_pretrained(args.out / "model")
    text = "".join(json.dumps(row) + "\n" for row in rows(200))
    (args.out / "rows.jsonl").write_text(text)


if __name__ == "__main__":
    main()
