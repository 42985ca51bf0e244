"""`megatron-dft es` as the command line runs it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from megatron_dft import cli
from tests.hf.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+1"}) + "\n" for a in range(6)))
    return str(path)


@pytest.fixture
def judge(tmp_path):
    """A reward that differs from text to text; it cannot tell of an empty one."""
    path = tmp_path / "judge.py"
    path.write_text(
        "def odd(text, answer, messages):\n"
        "    return sum(map(ord, text)) % 101 / 101 if text else None\n"
    )
    return ("--verifier", "python", "--function", f"{path}:odd")


def es(model, prompts, out, *words):
    options = ("--population", 4, "--sigma", 0.05, "--alpha", 0.05, "--max-tokens", 6)
    command = ("es", "--model", model, "--prompts", prompts, "--out", out, *options, *words)
    return cli.main([*map(str, command), "--device", "cpu", "--workers", "1"])


def records(out):
    return [json.loads(line) for line in (out / "members.0.jsonl").read_text().splitlines()]


def test_it_trains_exports_and_goes_on(model, prompts, judge, tmp_path, capsys):
    out = tmp_path / "run"
    words = (*judge, "--anchor-decay", 1, "--prompts-per-iteration", 4)
    assert es(model, prompts, out, *words, "--iterations", 2, "--save-interval", 1) == 0
    said = capsys.readouterr().out
    assert re.search(r"^iteration 1: reward 0\.\d+ \(members .*relative norm [1-9]", said, re.M)
    assert len(records(out)) == 8 and all(0 <= r["reward"] <= 1 for r in records(out))
    base, one, two = (
        load_file(next(p.glob("*.safetensors")))["model.norm.weight"]
        for p in (type(tmp_path)(model), out / "iteration-1", out / "iteration-2")
    )
    assert not torch.equal(base, one) and not torch.equal(one, two)
    assert "population" in (out / "iteration-2" / "README.md").read_text()
    assert es(model, prompts, out, *words, "--iterations", 3) == 0
    assert len(records(out)) == 12 and (out / "iteration-3" / "config.json").exists()


def test_what_cannot_be_judged_counts_0_by_kind(model, prompts, tmp_path, capsys):
    path = tmp_path / "judge.py"
    path.write_text("def broken(text, answer, messages):\n    raise RuntimeError\n")
    words = ("--verifier", "python", "--function", f"{path}:broken", "--iterations", 1)
    assert es(model, prompts, tmp_path / "run", *words) == 0
    assert {r["reward"] for r in records(tmp_path / "run")} == {0.0}
    error = capsys.readouterr().err
    assert "counted as reward 0: 24 × verifier that raised RuntimeError" in error


MISTAKES = [
    (("--iterations", 0), "--iterations: expected 1 or more, got 0"),
    (("--iterations", 1, "--population", 1), "--population: expected 2 or more"),
    (("--iterations", 1, "--samples", 2), "--samples 2 with --temperature 0"),
    (("--iterations", 1, "--batch-size", 0), "--batch-size: expected 1 or more"),
    (("--iterations", 1, "--verifier", "exact"), "--prompts: none of 6 prompts leaves room"),
    (("--iterations", 1, "--max-tokens", 1000), "--prompts: none of 6 prompts leaves room"),
    (("--iterations", 1, "--model", "/nowhere"), "--model '/nowhere' cannot be loaded"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes_are_one_line_before_anything_is_written(
    words, said, model, prompts, judge, tmp_path, capsys
):
    verifier = () if "--verifier" in words else judge
    assert es(model, prompts, tmp_path / "run", *verifier, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_same_directory_are_refused(model, prompts, judge, tmp_path, capsys):
    assert es(model, prompts, tmp_path / "run", *judge, "--iterations", 1) == 0
    assert es(model, prompts, tmp_path / "run", *judge, "--iterations", 1, "--sigma", 0.1) == 2
    assert "holds a run with sigma 0.05, but now it is 0.1" in capsys.readouterr().err
