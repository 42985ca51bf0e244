"""Samples of a tiny model: drawn from the right distribution, each by its own seed, kill-proof."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from megatron_dft.rollout.chat import Rendering, model_digest, stop_ids
from megatron_dft.rollout.draws import Decoding, Draw, sample_seed
from megatron_dft.rollout.prompt_tokens import PromptTokens
from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.sampler import draw_samples
from megatron_dft.rollout.store import read_samples
from megatron_dft.rollout.transformers_backend import SeededChoice, TransformersBackend
from tests.hf.tiny import END, START, make_tiny, tiny_tokenizer

PROMPTS = [
    Prompt(n, [{"role": "user", "content": "x" * (3 * n + 1)}], n, f"f:{n + 1}") for n in range(5)
]
DECODING = Decoding(temperature=1.0, max_tokens=8, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny("llama", tmp_path_factory.mktemp("rollout"), num_hidden_layers=2))


def backend(model, decoding=DECODING, batch_size=4, raw=False):
    prompts = PromptTokens(model, Rendering(raw=raw), False)
    return TransformersBackend(model, decoding, prompts, batch_size=batch_size, device="cpu")


def texts(directory):
    return {(r["prompt"], r["sample"]): r["text"] for r in read_samples(directory)}


def test_a_choice_has_the_probability_of_its_logit():
    logits = torch.tensor([2.0, 0.0, float("-inf"), 1.0, -1.0])
    wanted = torch.softmax(logits.double(), -1)
    count = 20_000
    choose = SeededChoice([sample_seed(7, 0, i) for i in range(count)])
    chosen = choose(torch.empty(count, 0), logits.expand(count, -1)).argmax(-1)
    found = Counter(chosen.tolist())
    assert 2 not in found
    for token, p in enumerate(wanted.tolist()):
        assert abs(found[token] / count - p) < 4 * math.sqrt(p * (1 - p) / count) + 1e-12


def test_the_ends_of_the_unit_interval_draw_no_impossible_token():
    """At 0 the first possible token, just below 1 the last one."""
    logits = torch.tensor([[float("-inf"), 0.0, 3.0, 0.0, float("-inf")]] * 2)
    choose = SeededChoice([0, 0])
    choose._rows = [SimpleNamespace(random=lambda: 0.0), SimpleNamespace(random=lambda: 1 - 2**-53)]
    assert choose(torch.empty(2, 0), logits).argmax(-1).tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # gemma3: sliding windows
def test_a_sample_depends_on_its_own_seed_alone(kind, model, tmp_path):
    """Neither on what it is drawn with, nor on prompts whose keys and values are shared."""
    if kind != "llama":
        model = str(make_tiny(kind, tmp_path / "model"))
    found = []
    for size in (1, 4, 64):
        draw_samples(tmp_path / str(size), PROMPTS, 3, DECODING, backend(model, batch_size=size))
        found.append(texts(tmp_path / str(size)))
    assert found[0] == found[1] == found[2] and len(found[0]) == 15
    assert len(set(found[0].values())) > 10
    other = Decoding(temperature=1.0, max_tokens=8, seed=4)
    draw_samples(tmp_path / "other", PROMPTS, 3, other, backend(model, other))
    assert texts(tmp_path / "other") != found[0]


def test_greedy_is_the_most_probable_token_each_time(model):
    greedy = Decoding(temperature=0, max_tokens=6)
    one = backend(model, greedy)
    ((_, answer),) = next(one.generate([Draw(PROMPTS[2], 0, 1)]))
    ids = torch.tensor([one._prompts.ids(PROMPTS[2])])
    drawn = []
    for _ in range(6):
        drawn.append(int(one.model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([drawn[-1:]])], 1)
        if drawn[-1] in one._prompts.stops:
            break
    assert answer.text == tiny_tokenizer().decode(drawn, skip_special_tokens=True)
    assert answer.tokens == len(drawn)


def test_a_small_nucleus_is_greedy_and_the_models_own_settings_do_not_count(model, tmp_path):
    greedy = Decoding(temperature=0, max_tokens=6)
    nucleus = Decoding(temperature=1.0, top_p=1e-6, max_tokens=6)
    penalised = shutil.copytree(model, tmp_path / "penalised")
    own = penalised / "generation_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"repetition_penalty": 50.0}))
    draw_samples(tmp_path / "g", PROMPTS, 1, greedy, backend(model, greedy))
    draw_samples(tmp_path / "n", PROMPTS, 1, nucleus, backend(str(penalised), nucleus))
    assert texts(tmp_path / "g") == texts(tmp_path / "n")


def _die_in_the_third_batch(model, directory):
    one, batches = backend(model), 0
    generate = one.generate

    def dying(draws):
        nonlocal batches
        batches += 1
        if batches == 3:
            # As if the kill came while the batch was being written: one line, and half of the next.
            ((draw, answer), *_) = next(generate(draws))
            line = {"prompt": draw.prompt.number, "sample": draw.sample, "seed": draw.seed}
            with open(directory / "samples.0-of-1.jsonl", "ab") as file:
                file.write(json.dumps(line | asdict(answer)).encode() + b'\n{"prompt": 0, "sam')
            os.kill(os.getpid(), signal.SIGKILL)
        yield from generate(draws)

    one.generate = dying
    draw_samples(directory, PROMPTS, 3, DECODING, one)


def test_killed_and_resumed_gives_the_same_set(model, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    draw_samples(unbroken, PROMPTS, 3, DECODING, backend(model))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die_in_the_third_batch, args=(model, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    outcome = draw_samples(killed, PROMPTS, 3, DECODING, backend(model))
    assert (outcome.kept, outcome.samples, outcome.missing) == (9, 6, 0)
    lines = (killed / "samples.0-of-1.jsonl").read_text().splitlines()
    assert len(lines) == 15  # nothing twice
    assert read_samples(killed) == read_samples(unbroken)


def test_a_finished_directory_needs_no_model(model, tmp_path):
    draw_samples(tmp_path, PROMPTS, 1, DECODING, backend(model))
    again = backend(model)
    outcome = draw_samples(tmp_path, PROMPTS, 1, DECODING, again)
    assert (outcome.samples, outcome.kept) == (0, 5) and "model" not in vars(again)


def test_parts_share_the_prompts(model, tmp_path):
    for part in range(2):
        one = backend(model)
        draw_samples(tmp_path / "parts", PROMPTS, 2, DECODING, one, part=(part, 2))
    draw_samples(tmp_path / "whole", PROMPTS, 2, DECODING, backend(model))
    assert texts(tmp_path / "parts") == texts(tmp_path / "whole")


def test_a_prompt_longer_than_the_model_is_counted(model, tmp_path):
    long = Prompt(9, [{"role": "user", "content": "y" * 200}], None, "f:10")
    outcome = draw_samples(tmp_path, [*PROMPTS, long], 2, DECODING, backend(model))
    assert outcome.samples == 10 and outcome.missing == 0
    assert "1 × prompt that leaves no room for --max-tokens 8 in 128 (first: f:10)" in str(
        outcome.skips
    )


def test_another_model_at_the_same_place_is_refused(model, tmp_path):
    draw_samples(tmp_path / "s", PROMPTS, 1, DECODING, backend(model))
    other = str(make_tiny("llama", tmp_path / "m", num_hidden_layers=2, seed=5))
    assert model_digest(tmp_path / "m") != model_digest(tmp_path)
    with pytest.raises(ValueError, match="holds samples with model"):
        draw_samples(tmp_path / "s", PROMPTS, 1, DECODING, backend(other))


def test_a_base_models_template_names_the_end_of_a_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = START  # the checkpoint's own end of text
    ends = {tokenizer.convert_tokens_to_ids(t) for t in (START, END)}
    assert stop_ids(tokenizer, 7) == ends | {7}


def test_raw_prompts_and_stop_texts(model, tmp_path):
    how = Decoding(temperature=1.0, max_tokens=12, seed=1)
    prompts = [Prompt(n, [{"role": "user", "content": "ab" * (n + 1)}], n, "") for n in range(3)]
    draw_samples(tmp_path / "free", prompts, 4, how, backend(model, how, raw=True))
    free = {k: t for k, t in texts(tmp_path / "free").items() if len(t) > 4}
    stop = next(iter(free.values()))[2]
    stopped = Decoding(temperature=1.0, max_tokens=12, seed=1, stop=(stop,))
    draw_samples(tmp_path / "stop", prompts, 4, stopped, backend(model, stopped, raw=True))
    for record in read_samples(tmp_path / "stop"):
        text = texts(tmp_path / "free")[record["prompt"], record["sample"]]
        assert record["text"] == text.partition(stop)[0]
        assert record["finish"] == "stop" or stop not in text
    with pytest.raises(ValueError, match="--raw: expected prompts of one text"):
        talk = [{"role": "system", "content": "s"}, *PROMPTS[0].messages]
        draw_samples(
            tmp_path / "no", [Prompt(0, talk, 0, "")], 1, how, backend(model, how, raw=True)
        )


@pytest.mark.parametrize(
    ("decoding", "samples", "text"),
    [
        (Decoding(temperature=-1), 1, "--temperature"),
        (Decoding(temperature=float("nan")), 1, "--temperature"),
        (Decoding(top_p=0), 1, "--top-p"),
        (Decoding(max_tokens=0), 1, "--max-tokens"),
        (Decoding(), 0, "--samples"),
        (Decoding(temperature=0), 2, "--samples 2 with --temperature 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(decoding, samples, text):
    with pytest.raises(ValueError, match=text):
        decoding.check(samples)
