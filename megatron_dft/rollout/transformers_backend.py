"""Samples from a Hugging Face checkpoint with transformers, on the CPU or one GPU."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from megatron_dft.rollout.draws import Answer, Decoding, Draw, Result
from megatron_dft.rollout.prompt_tokens import PromptTokens, first_line
from megatron_dft.rollout.prompts import Prompt

_KEYS_AND_VALUES = {"full_attention", "sliding_attention"}


class SeededChoice(LogitsProcessor):
    """Draws each row's token from that row's own random numbers.

    `generate` draws all rows from one generator, so a sample would depend on its neighbours. Here
    the draw is made among the logits (inverse of the cumulated softmax at one uniform number a
    row and step), and greedy search then has one finite logit a row to take.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._rows = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: logits [rows, vocabulary], −inf where not allowed; not changed."""
        mass = torch.softmax(scores.double(), -1).cumsum(-1)
        total = mass[:, -1:]
        uniform = torch.tensor([[r.random()] for r in self._rows], dtype=torch.float64)
        at = uniform.to(mass.device) * total
        # Rounding may reach the total, behind which there is no token.
        at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
        choice = torch.searchsorted(mass, at, right=True)
        return torch.full_like(scores, float("-inf")).scatter_(-1, choice, 0.0)


class TransformersBackend:
    """A model in this process. batch_size: draws in one call of `generate`."""

    name = "transformers"
    whole_batches = True

    def __init__(
        self,
        model: str,
        decoding: Decoding,
        prompts: PromptTokens,
        *,
        batch_size: int = 64,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.batch_size, self._decoding, self._prompts = batch_size, decoding, prompts
        self._device = _device(device)
        # Most CPUs compute bfloat16 slower than float32.
        self._dtype = "float32" if dtype == "auto" and self._device == "cpu" else dtype
        self._name, self._trust_remote_code = model, trust_remote_code

    @cached_property
    def model(self) -> Any:
        """Loaded when the first answer is drawn: a finished run needs none."""
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._name, dtype=self._dtype, trust_remote_code=self._trust_remote_code
            )
        except (OSError, KeyError) as error:
            reason = first_line(error)
            raise ValueError(f"--model {self._name!r} cannot be loaded: {reason}") from None
        # `generate` fills what a call leaves open from the checkpoint's own settings: a penalty of
        # repetitions or a top-k would change what is sampled.
        model.generation_config = GenerationConfig()
        return model.to(self._device).eval()

    def identity(self) -> dict[str, Any]:
        own = {"model": self._prompts.digest, "dtype": self._dtype}
        return {"backend": self.name, "batch_size": self.batch_size, **own}

    def length(self, prompt: Prompt) -> int:
        return len(self._prompts.ids(prompt))

    def room(self) -> int | None:
        return self._prompts.room

    def generate(self, draws: Sequence[Draw]) -> Iterator[list[Result]]:
        """One batch, all at once; raises ValueError where the memory does not hold it."""
        prompts = {d.prompt.number: self._prompts.ids(d.prompt) for d in draws}
        places = {number: i for i, number in enumerate(prompts)}
        ids, mask = self._padded(list(prompts.values()))
        rows = torch.tensor([places[d.prompt.number] for d in draws], device=self._device)
        try:
            out = self._generate(ids, mask, rows, [d.seed for d in draws])
        except torch.OutOfMemoryError:
            raise ValueError(
                f"--batch-size {len(draws)}: the GPU's memory does not hold it; lower it"
            ) from None
        new = out[:, ids.shape[1] :].tolist()
        yield [(draw, self._answer(row)) for draw, row in zip(draws, new, strict=True)]

    @torch.inference_mode()
    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, seeds: list[int]
    ) -> torch.Tensor:
        """Ids [rows, longest prompt + new] of prompts and answers.

        ids, mask: int64 [prompts, longest], left-padded; rows: the prompt of each answer.
        """
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._decoding.max_tokens,
            pad_token_id=self._prompts.pad,
            eos_token_id=sorted(self._prompts.stops) or None,
            stop_strings=list(self._decoding.stop) or None,
        )
        stopping = {"tokenizer": self._prompts.tokenizer} if self._decoding.stop else {}
        return self.model.generate(
            input_ids=ids[rows],
            attention_mask=mask[rows],
            generation_config=config,
            logits_processor=self._processors(seeds),
            **self._prefilled(ids, mask, rows),
            **stopping,
        )

    def _prefilled(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, DynamicCache]:
        """Keys and values of all prompt tokens but the last, once for all answers of a prompt.

        Nothing where `generate` has to see to it: no prompt has two answers, or the layers keep
        something else than keys and values.
        """
        layout = self.model.config.get_text_config()
        plain = set(getattr(layout, "layer_types", None) or ()) <= _KEYS_AND_VALUES
        plain = plain and self.model._supports_default_dynamic_cache()
        if len(rows) == len(ids) or ids.shape[1] < 2 or not plain:
            return {}
        # The argument was renamed within transformers 5.
        known = inspect.signature(self.model.forward).parameters
        cache = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=layout)}
        seen = mask[:, :-1]
        self.model(
            input_ids=ids[:, :-1],
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
        next(iter(cache.values())).batch_select_indices(rows)
        return cache

    def _processors(self, seeds: list[int]) -> LogitsProcessorList:
        how = self._decoding
        if how.temperature == 0:
            return LogitsProcessorList()
        steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(how.temperature))]
        if how.top_p < 1:
            steps.append(TopPLogitsWarper(how.top_p))
        return LogitsProcessorList([*steps, SeededChoice(seeds)])

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, int64 [rows, longest], padded on the left."""
        width, pad = max(map(len, rows)), self._prompts.pad
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        return ids.to(self._device), mask.to(self._device)

    def _answer(self, ids: list[int]) -> Answer:
        stops, tokenizer = self._prompts.stops, self._prompts.tokenizer
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        drawn = ids if end is None else ids[: end + 1]
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
        cut = min((text.find(s) for s in self._decoding.stop if s in text), default=None)
        if cut is None:
            return Answer(text, len(drawn), "length" if end is None else "stop")
        while drawn and drawn[-1] == self._prompts.pad:  # the row was done before its batch
            drawn = drawn[:-1]
        return Answer(text[:cut], len(drawn), "stop")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU is there; leave it out, or give cpu")
    return name
