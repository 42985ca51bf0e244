"""What is handed to vLLM, on a stand-in with the signatures that its `LLM` has."""

import sys
import types
from dataclasses import dataclass

import pytest

from megatron_dft.rollout.chat import Rendering
from megatron_dft.rollout.draws import Decoding, Draw, Fault, sample_seed
from megatron_dft.rollout.prompts import Prompt
from tests.hf.tiny import make_tiny

PROMPT = Prompt(4, [{"role": "user", "content": "hi"}], None, "f:5")


@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop: list
    stop_token_ids: list


class LLM:
    def __init__(self, model, *, dtype, seed, tensor_parallel_size, trust_remote_code):
        self.given = locals()

    def generate(self, prompts, sampling_params, *, use_tqdm):
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._output(p["prompt_token_ids"], s) for p, s in pairs]

    def _output(self, ids, params):
        finish = "abort" if params.seed == sample_seed(1, 4, 1) else "length"
        one = types.SimpleNamespace(
            text=f"{len(ids)}/{params.seed}", token_ids=(1, 2, 3), finish_reason=finish
        )
        return types.SimpleNamespace(outputs=[one])


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delitem(sys.modules, "megatron_dft.rollout.vllm_backend", raising=False)


def test_ids_seeds_and_ends(vllm, tmp_path):
    from megatron_dft.rollout.prompt_tokens import PromptTokens
    from megatron_dft.rollout.vllm_backend import VllmBackend

    model = str(make_tiny("llama", tmp_path, num_hidden_layers=1))
    tokens = PromptTokens(model, Rendering(), False)
    how = Decoding(temperature=0.6, top_p=0.95, max_tokens=9, seed=1, stop=("\n\n",))
    backend = VllmBackend(model, how, tokens, tensor_parallel_size=2)
    assert "_llm" not in vars(backend)
    draws = [Draw(PROMPT, s, sample_seed(1, 4, s)) for s in range(2)]
    (results,) = backend.generate(draws)
    assert results[0][1].text == f"{len(tokens.ids(PROMPT))}/{draws[0].seed}"
    assert (results[0][1].tokens, results[0][1].finish) == (3, "length")
    assert results[1][1] == Fault("answer that ended with 'abort'")
    params = backend._params(draws[0])
    assert params == SamplingParams(1, 0.6, 0.95, 9, draws[0].seed, ["\n\n"], sorted(tokens.stops))
    given = backend._llm.given
    assert (given["model"], given["tensor_parallel_size"]) == (model, 2)
    assert backend.room() == 128 and backend.length(PROMPT) == len(tokens.ids(PROMPT))
