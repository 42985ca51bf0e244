"""A small tokenizer and chat templates in the manner of the well-known families, written here."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec

_TEXTS = [
    "What is the sum of twelve and seven? The answer is nineteen.",
    "user assistant system tool model Hello\n\nworld, how are you today?\n",
    "  indented code:\n    return x ** 2\n\n\n",
    "Let me think step by step. First, 12 + 7 = 19.\n\nSo the answer is 19.",
] * 4


@cache
def _trained_backend(specials: tuple[str, ...], plain: tuple[str, ...]) -> str:
    """A byte-level BPE with merges over newlines and spaces, as Llama 3 and Qwen have them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # Trims whitespace off the offsets, as most published byte-level tokenizers do.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in specials])
    backend.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return backend.to_str()


def byte_level_tokenizer(
    template: str,
    specials: tuple[str, ...],
    eos: str,
    bos: str | None = None,
    plain: tuple[str, ...] = (),
) -> Any:
    """A transformers fast tokenizer; `plain` are added tokens that are not special."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_backend(specials, plain)),
        eos_token=eos,
        bos_token=bos,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def chatml_tokenizer() -> Any:
    """A plain ChatML tokenizer without a pad token; its eos ends the turns."""
    return byte_level_tokenizer(CHATML_TEMPLATE, CHATML_SPECIALS, eos="<|im_end|>")


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return str(path)


def chat(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages user, assistant, user, … from their contents."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def prepare_file(path, tokenizer, **options):
    """The store of one data file."""
    return prepare(parse_sources([path]), encoder_spec(tokenizer), PrepareOptions(**options))[0]


def decoded(store, tokenizer):
    """(whole text, trained text) of each conversation."""
    out = []
    for i in range(len(store)):
        flagged = store.flagged(i)
        ids, trained = flagged & ID_MASK, (flagged & SUPERVISED) != 0
        out.append((tokenizer.decode(ids), tokenizer.decode(ids[trained])))
    return out
