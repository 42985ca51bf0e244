"""A checkpoint's tokenizer and configuration, as both local backends use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from megatron_dft.data.tokenizer import load_as_it_is
from megatron_dft.rollout.chat import Rendering, model_digest, stop_ids
from megatron_dft.rollout.prompts import Prompt


class PromptTokens:
    """Prompts to ids. stops: ids that end an answer; room: [tokens] of prompt and answer."""

    def __init__(self, model: str, rendering: Rendering, trust_remote_code: bool) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer = load_as_it_is(model, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"--model {model!r} cannot be loaded: {first_line(error)}") from None
        rendering.check(self.tokenizer, model)
        self._rendering = rendering
        self._ids: dict[int, list[int]] = {}
        self.room: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.stops = stop_ids(self.tokenizer, _configured_stops(model, config))
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else min(self.stops, default=0)
        self.digest = model_digest(Path(model))

    def ids(self, prompt: Prompt) -> list[int]:
        if prompt.number not in self._ids:
            self._ids[prompt.number] = self._rendering.ids(self.tokenizer, prompt.messages)
        return self._ids[prompt.number]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _configured_stops(model: str, config: Any) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError):  # a checkpoint may come without one
        return getattr(config, "eos_token_id", None)
