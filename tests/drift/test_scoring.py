"""Scores and retention against float64 formulas written from the definitions; the commands."""

import json
import math

import numpy as np
import pytest
import torch

from megatron_dft.commands import diagnose as diagnose_command
from megatron_dft.commands import retention as retention_command
from megatron_dft.data import scored_text
from megatron_dft.drift import sampling, scoring
from megatron_dft.drift.retention import measure
from tests.drift.commands import fails, run
from tests.hf.tiny import make_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_tiny("llama", root / f"m{i}", seed=i, num_hidden_layers=2) for i in range(2)]


@pytest.fixture(scope="module")
def texts():
    g = np.random.default_rng(0)
    rows = []
    for length in (5, 40, 23, 2):
        mask = g.random(length) < 0.6
        mask[0], mask[-1] = False, True
        rows.append((g.integers(0, 259, length), mask))
    return rows


def distributions(model, rows):
    """Targets [K] and float64 probabilities [K, V], one text at a time, no padding."""
    targets, probs = [], []
    for ids, mask in rows:
        logits = model(torch.from_numpy(ids)[None]).logits[0].double()
        at = np.flatnonzero(mask)
        targets.append(ids[at])
        probs.append(torch.softmax(logits[at - 1], -1).detach().numpy())
    return np.concatenate(targets), np.concatenate(probs)


def test_retention_equals_the_definitions(models, texts):
    base, tuned = (scoring.load_model(m) for m in models)
    target, p = distributions(base, texts)
    _, q = distributions(tuned, texts)
    got = measure(base, tuned, texts)
    rows = range(len(target))
    assert got["tokens"] == len(target)
    assert got["base_perplexity"] == pytest.approx(math.exp(-np.log(p[rows, target]).mean()), 1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(-np.log(q[rows, target]).mean()), 1e-5)
    each = (p * np.log(p / q)).sum(1)
    assert got["kl"] == pytest.approx(each.mean(), rel=1e-5)
    assert got["reverse_kl"] == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-5)
    parts = np.split(each, np.cumsum([mask.sum() for _, mask in texts])[:-1])
    assert got["kl_sequence"] == pytest.approx(np.mean([x.sum() for x in parts]), rel=1e-5)
    spread = sum((x.sum() - each.mean() * len(x)) ** 2 for x in parts) * len(parts)
    error = math.sqrt(spread / (len(parts) - 1)) / len(each)
    assert got["kl_error"] == pytest.approx(error, rel=1e-4)
    assert got["top1_agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert got["top1_agreement"] < 1 and got["kl"] > 0.01
    same = measure(base, base, texts)
    assert same["kl_error"] == 0 and measure(base, tuned, texts[:1])["kl_error"] is None
    assert same["kl"] == 0 and same["top1_agreement"] == 1
    with pytest.raises(ValueError, match="no token to score"):
        measure(base, tuned, [])


@torch.no_grad()
def test_the_kl_on_sampled_answers_is_that_of_the_answers_distribution(models):
    """Two tokens long, so that KL(base ‖ tuned) of whole answers can be summed over all of them."""
    base, tuned = (scoring.load_model(m) for m in models)
    base.generation_config.repetition_penalty = 5.0  # not what the model itself would say
    prompts = [np.array([5, 9, 11]), np.array([7])]
    end = 3
    exact = []
    for prompt in prompts:
        first = [torch.softmax(m(torch.tensor([prompt])).logits[0, -1].double(), -1)
                 for m in (base, tuned)]  # fmt: skip
        rows = torch.tensor([[*prompt, i] for i in range(259)])
        second = [torch.softmax(m(rows).logits[:, -1].double(), -1) for m in (base, tuned)]
        inner = (second[0] * (second[0] / second[1]).log()).sum(-1)
        inner[end] = 0  # nothing follows
        exact.append((first[0] * ((first[0] / first[1]).log() + inner)).sum())
    answers = sampling.sample_answers(base, prompts * 400, [end], 2)
    assert {len(ids) - int(mask.sum()) for ids, mask in answers} == {1, 3}
    assert all(ids[mask][0] == end for ids, mask in answers if mask.sum() == 1)
    got = measure(base, tuned, answers)
    want = float(torch.stack(exact).mean())
    error = 4 * got["kl_error"] * got["tokens"] / len(answers)
    assert got["kl_sequence"] == pytest.approx(want, abs=error) and error < 0.1 * want
    again = sampling.sample_answers(base, prompts * 400, [end], 2)
    assert all((a[0] == b[0]).all() for a, b in zip(answers, again, strict=True))


def test_scores_equal_the_definitions(models, texts):
    model = scoring.load_model(models[0])
    target, p = distributions(model, texts)
    found = list(scoring.score(model, texts))
    # Batches come longest first; put the reference in that order.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
    ends = np.cumsum([t[1].sum() for t in texts])
    index = np.concatenate([np.arange(ends[i] - texts[i][1].sum(), ends[i]) for i in order])
    target, p = target[index], p[index]

    def column(name):
        return np.concatenate([getattr(s, name) for s in found])

    assert (column("target") == target).all()
    assert np.allclose(column("prob"), p[range(len(target)), target], rtol=1e-4)
    assert np.allclose(column("entropy"), -(p * np.log(p)).sum(1), rtol=1e-5)
    assert np.allclose(column("sum_sq"), (p**2).sum(1), rtol=1e-4)
    assert (column("top") == p.argmax(1)).all()
    assert np.allclose(column("top_prob"), p.max(1), rtol=1e-4)


def test_batches_part_the_texts_and_keep_their_size():
    texts = [(np.arange(n), np.ones(n, dtype=bool)) for n in (3, 9, 4, 12, 3, 30, 2)]
    found = list(scoring.batches(texts, 12))
    lengths = [[len(ids) for ids, _ in batch] for batch in found]
    assert lengths == [[30], [12], [9], [4, 3, 3], [2]]
    assert all(len(b) * b[0] <= 12 for b in lengths[1:])


class _Table(torch.nn.Module):
    """A model that gives the same logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(logits))

    def get_input_embeddings(self):
        return torch.nn.Embedding(len(self.weight), 1)

    def forward(self, input_ids, use_cache):
        return type("Out", (), {"logits": self.weight.expand(*input_ids.shape, -1)})


def test_tokens_that_the_base_rules_out_add_nothing_to_the_kl():
    ruled_out = _Table([0.0, 1.0, -math.inf])
    tuned = _Table([1.0, 0.0, -math.inf])
    text = [(np.array([0, 1, 0]), np.array([False, True, True]))]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    got = measure(ruled_out, tuned, text)
    assert got["kl"] == pytest.approx((p * np.log(p / p[::-1])).sum(), rel=1e-6)
    assert got["top1_agreement"] == 0
    with pytest.raises(ValueError, match="vocabularies have 3 and 2 entries"):
        measure(ruled_out, _Table([1.0, 0.0]), text)


def test_pickled_weights_are_not_opened(models, tmp_path):
    import shutil

    directory = tmp_path / "pickled"
    shutil.copytree(models[0], directory)
    weights = scoring.load_model(directory).state_dict()
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        scoring.load_model(directory)


def test_places_count_within_each_answer():
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1], dtype=bool)
    assert scoring.answer_places(mask)[mask].tolist() == [0, 1, 2, 0, 0, 1]


def test_windows_score_every_target_once():
    ids, mask = np.arange(20), np.ones(20, dtype=bool)
    mask[:3] = False
    parts = list(scoring.windows([(ids, mask)], 6))
    assert [p[0].tolist() for p in parts][1] == [5, 6, 7, 8, 9, 10]
    scored = np.concatenate([p[0][p[1]] for p in parts])
    assert scored.tolist() == list(range(3, 20))
    assert list(scoring.windows([(ids, np.zeros(20, dtype=bool))], 6)) == []


CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"<script>alert({i})</script> \\u2028 & 'x'"},
        ]
    }
    for i in range(6)
]


@pytest.fixture
def files(tmp_path):
    chat, text = tmp_path / "chat.jsonl", tmp_path / "text.jsonl"
    chat.write_text("".join(json.dumps(r) + "\n" for r in CHAT))
    text.write_text("".join(json.dumps({"text": f"Some held out text, {i}."}) + "\n" for i in "ab"))
    return chat, text


def test_diagnose_command(models, files, tmp_path, capsys):
    run(diagnose_command, models[0], files[0], "--out", tmp_path / "out")
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert f"--loss {result['recommendation']['loss']}" in said
    # Every answer's tokens, its end-of-turn token too, and nothing of the questions.
    answers = [len(r["messages"][1]["content"].encode()) + 1 for r in CHAT]
    assert result["overall"]["tokens"] == sum(answers)
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert page.count("<script>") == 1 and "alert(" not in page
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "probability.png",
        "groups.png",
        "entropy.png",
    }


def test_retention_command(models, files, tmp_path, capsys):
    chat, text = files
    out = tmp_path / "out"
    flags = ("--task-samples", 3, "--max-answer-tokens", 5)
    run(retention_command, *models, "--text", text, "--task", chat, "--out", out, *flags)
    result = json.loads((out / "retention.json").read_text())
    values = result["methods"]["m1"]
    base, tuned = (scoring.load_model(m) for m in models)
    rows = scored_text.plain_text(text, scored_text.tokenizer_of(models[0], chat=False))
    assert values["general"] == pytest.approx(measure(base, tuned, rows), rel=1e-5)
    assert values["task"]["tokens"] == sum(len(r["messages"][1]["content"]) + 1 for r in CHAT)
    assert 3 <= values["task, base's answers"]["tokens"] <= 15
    page = (out / "report.html").read_text()
    assert "Retention: what m0 said" in page and "should have forgotten" not in page
    fails(retention_command, "--task-samples 3: expected --task", *models, "--text", text, *flags)


def test_bad_input_of_the_commands(models, files, tmp_path):
    chat, text = files
    fails(retention_command, "expected at least one held-out file", *models)
    fails(retention_command, '"text"', *models, "--text", chat)
    fails(retention_command, "does not exist", *models, "--text", tmp_path / "none")
    fails(retention_command, "--window: expected 2", *models, "--text", text, "--window", 1)
    fails(retention_command, "--labels: expected 1", *models, "--text", text, "--labels", "a", "b")
    fails(diagnose_command, "--max-tokens: expected 1", models[0], chat, "--max-tokens", 0)
    fails(diagnose_command, "DATA", models[0], tmp_path / "none.jsonl")
    fails(diagnose_command, "cannot be loaded", tmp_path, chat)
    broken = make_tiny("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"xx")
    fails(diagnose_command, "cannot be loaded as a causal language model", broken, chat)


def test_a_foreign_tokenizer_is_an_error(models):
    model = scoring.load_model(models[0])
    text = (np.array([1, 300]), np.array([False, True]))
    with pytest.raises(ValueError, match="token id 300, but the model embeds 259"):
        list(scoring.score(model, [text]))


@pytest.mark.parametrize("family, expected", [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_never_what_a_config_asks_for(family, expected, tmp_path, monkeypatch):
    """A name with a slash is a repository of kernels, fetched from the hub and run."""
    import transformers.modeling_utils as modeling

    def fetched(*args, **kwargs):
        raise AssertionError("kernels were asked for")

    monkeypatch.setattr(modeling, "lazy_import_flash_attention", fetched)
    directory = make_tiny(family, tmp_path / family)
    config = json.loads((directory / "config.json").read_text())
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        config[key] = "evil/kernels"
    (directory / "config.json").write_text(json.dumps(config))
    assert scoring.load_model(directory).config._attn_implementation == expected
