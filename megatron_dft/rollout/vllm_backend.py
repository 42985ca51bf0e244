"""Samples from a Hugging Face checkpoint with vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from vllm import LLM, SamplingParams

from megatron_dft.rollout.draws import Answer, Decoding, Draw, Fault, Result
from megatron_dft.rollout.prompt_tokens import PromptTokens
from megatron_dft.rollout.prompts import Prompt


class VllmBackend:
    """vLLM's `LLM` on ids that our own rendering made, with a seed for every answer.

    batch_size: draws that are handed over, and stored, together. vLLM fills its own batches from
    them, so that near-ties can come out otherwise from run to run.
    """

    name = "vllm"
    whole_batches = False

    def __init__(
        self,
        model: str,
        decoding: Decoding,
        prompts: PromptTokens,
        *,
        batch_size: int = 4096,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        self.batch_size, self._decoding, self._prompts = batch_size, decoding, prompts
        self._dtype = dtype
        self._engine = {
            "model": model,
            "dtype": dtype,
            "seed": decoding.seed,
            "tensor_parallel_size": tensor_parallel_size,
            "trust_remote_code": trust_remote_code,
        }

    @cached_property
    def _llm(self) -> Any:
        """Started when the first answer is drawn: a finished run needs none."""
        return LLM(**self._engine)

    def identity(self) -> dict[str, Any]:
        return {"backend": self.name, "model": self._prompts.digest, "dtype": self._dtype}

    def length(self, prompt: Prompt) -> int:
        return len(self._prompts.ids(prompt))

    def room(self) -> int | None:
        return self._prompts.room

    def generate(self, draws: Sequence[Draw]) -> Iterator[list[Result]]:
        prompts = [{"prompt_token_ids": self._prompts.ids(d.prompt)} for d in draws]
        outputs = self._llm.generate(prompts, [self._params(d) for d in draws], use_tqdm=False)
        yield [(draw, _answer(out)) for draw, out in zip(draws, outputs, strict=True)]

    def _params(self, draw: Draw) -> Any:
        how = self._decoding
        return SamplingParams(
            n=1,
            temperature=how.temperature,
            top_p=how.top_p,
            max_tokens=how.max_tokens,
            seed=draw.seed,
            stop=list(how.stop) or None,
            stop_token_ids=sorted(self._prompts.stops),
        )


def _answer(output: Any) -> Answer | Fault:
    one = output.outputs[0]
    if one.finish_reason not in ("stop", "length"):
        return Fault(f"answer that ended with {one.finish_reason!r}")
    return Answer(one.text, len(one.token_ids), one.finish_reason)
