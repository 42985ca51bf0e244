"""Prompts as a checkpoint wants them: its chat template, where a turn ends, what it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dft.data.bounds import Bounded

_MARK = "zanzibar"
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class Rendering:
    """raw: the prompt's text as it is, without a chat template; template: Jinja in its place."""

    raw: bool = False
    template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def check(self, tokenizer: Any, model: str) -> None:
        """Raises ValueError where the tokenizer has no chat template and none was given."""
        if not self.raw and not (self.template or tokenizer.chat_template):
            raise ValueError(
                f"--model {model!r}: its tokenizer has no chat template; give --chat-template "
                "FILE, or --raw to let the model continue the prompt's text"
            )

    def ids(self, tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the prompt, ready for the answer."""
        if self.raw:
            return tokenizer(raw_text(messages))["input_ids"]
        try:
            with Bounded():
                return tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **self.variables,
                )
        except Exception as error:  # a template may raise whatever it likes
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses a prompt: {reason}") from None


def raw_text(messages: Sequence[dict[str, Any]]) -> str:
    """The only message's text. Raises ValueError where a chat cannot be one text."""
    if len(messages) != 1:
        raise ValueError(
            "--raw: expected prompts of one text, got a conversation of "
            f"{len(messages)} messages; leave --raw and --system out"
        )
    return messages[0]["content"]


def stop_ids(tokenizer: Any, configured: int | list[int] | None) -> set[int]:
    """Ids that end an answer: those of the generation config, EOS, and the template's turn end.

    A base model's config names only its end of text, while its chat template ends a turn
    otherwise; fine-tuned on that template it would never stop.
    """
    stops = {configured} if isinstance(configured, int) else set(configured or ())
    stops |= {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}]
        try:
            with Bounded():
                text = tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:  # it wants variables of its own; its prompts are rendered with them
            return stops
        rest = tokenizer(text.partition(_MARK)[2], add_special_tokens=False)["input_ids"]
        # Not all_special_ids: a token may be special without a name such as eos.
        stops |= {i for i in rest[:1] if _is_special(tokenizer, i)}
    return stops


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def model_digest(path: Path) -> str:
    """Tells two checkpoints apart: sizes, and the edges of every file of weights.

    A hub name is its own digest.
    """
    if not path.is_dir():
        return str(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*path.glob("*.safetensors"), *path.glob("config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES), os.SEEK_SET)
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()
