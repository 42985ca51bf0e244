"""A small tokenizer and chat templates in the manner of the well-known families, written here."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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


class Family:
    """A chat template with what it needs: special tokens, eos, and how an answer must look.

    turn(content) is the text that must train for an assistant message: what the template puts
    behind its generation prompt, up to and with the end-of-turn token.
    """

    def __init__(
        self,
        name: str,
        template: str,
        specials: list[str],
        eos: str,
        end: str,
        bos: str | None = None,
        plain: tuple[str, ...] = (),
        lead: str = "",
        trims: bool = False,
        system: bool = True,
        tools: bool = False,
    ) -> None:
        self.name, self.template, self.end, self.lead = name, template, end, lead
        self.specials, self.eos, self.bos, self.plain = tuple(specials), eos, bos, plain
        self.trims, self.system, self.tools = trims, system, tools

    def tokenizer(self) -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_trained_backend(self.specials, self.plain)),
            eos_token=self.eos,
            bos_token=self.bos,
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = self.template
        return tokenizer

    def turn(self, content: str) -> str:
        return self.lead + (content.strip() if self.trims else content) + self.end


CHATML = Family(
    "chatml",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", end="<|im_end|>",
)  # fmt: skip


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return str(path)


def chat(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages user, assistant, user, … from their contents."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
