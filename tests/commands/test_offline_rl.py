"""sample → verify → rows, and evaluate, as the command line runs them."""

import json
import os
import signal
import subprocess
import sys

import pytest

from megatron_dft import cli
from megatron_dft.data.schema import parse_row
from megatron_dft.rollout.metrics import wilson
from megatron_dft.rollout.store import read_samples
from tests.hf.tiny import make_tiny
from tests.rollout.server import answer, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1))


@pytest.fixture
def prompts(tmp_path):
    rows = [{"question": f"{a}+1", "gold": str(a + 1)} for a in range(8)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


COLUMNS = ("--columns", "prompt=question", "answer=gold")


def command(*words):
    return cli.main([str(w) for w in words])


def calculator(_, body):
    """Right at odd seeds; wrong or without a marker at even ones."""
    left, _, right = body["messages"][-1]["content"].partition("+")
    total = int(left) + int(right)
    wrong = f"#### {total + 1}" if body["seed"] % 4 == 0 else "who knows"
    text = f"{left} plus {right} is\n#### {total}" if body["seed"] % 2 else wrong
    return 200, answer(body, message={"content": text})


def sampled(prompts, out, url, *words):
    words = ("--endpoint", url, "--samples", 6, "--max-tokens", 20, "--concurrency", 4, *words)
    return command(
        "sample", "--model", "tiny", "--prompts", prompts, "--out", out, *COLUMNS, *words
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_verify_and_the_rows_that_train(prompts, tmp_path, capsys):
    with serving(calculator) as server:
        assert sampled(prompts, tmp_path / "s", server.url, "--system", "Add.") == 0
    out = tmp_path / "kept.jsonl"
    verifier = ("--verifier", "exact", "--marker", "####")
    assert command("verify", tmp_path / "s", *verifier, "--dedupe", "none", "--out", out) == 0
    samples = read_samples(tmp_path / "s")
    odd = [s for s in samples if s["seed"] % 2]
    rows = lines(out)
    assert len(samples) == 48 and 0 < len(rows) == len(odd) < 48
    assert {(r["prompt_number"], r["sample_number"]) for r in rows} == {
        (s["prompt"], s["sample"]) for s in odd
    }
    for row in rows:
        talk = parse_row(row, None).messages
        assert [m["role"] for m in talk] == ["system", "user", "assistant"]
        assert (row["reward"], row["weight"]) == (1.0, 1.0)
    rewards = lines(tmp_path / "kept.rewards.jsonl")
    assert len(rewards) == 48  # nothing sampled is lost
    silent = sum(s["seed"] % 4 == 2 for s in samples)
    said = capsys.readouterr().out
    assert f"{silent} × sample without the marker" in said
    assert f"{len(rows)} rows of" in said


def test_nothing_to_train_on_is_one_line_and_keeps_the_rewards(prompts, tmp_path, capsys):
    with serving() as server:
        sampled(prompts, tmp_path / "s", server.url)
    verifier = ("--verifier", "python", "--function", "tests.rollout.judges:moody")
    bad = ("--verifier", "exact", "--marker", "####")
    assert command("verify", tmp_path / "s", *bad, "--out", tmp_path / "k.jsonl") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "no sample is left to train on: 48 × not correct" in error
    assert len(lines(tmp_path / "k.rewards.jsonl")) == 48 and not (tmp_path / "k.jsonl").exists()
    pairs = ("--keep", "pairs", "--out", tmp_path / "p.jsonl")
    assert command("verify", tmp_path / "s", *bad, *pairs) == 2
    assert "to train on: 48 × all of a prompt alike" in capsys.readouterr().err
    assert command("verify", tmp_path / "s", *verifier, "--out", tmp_path / "k.jsonl") == 0


def test_an_empty_reference_is_none_and_makes_no_empty_answer_right(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": "1+1", "gold": "2"}, {"question": "2+1", "gold": " "}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with serving(lambda _, body: (200, answer(body, message={"content": "#### "}))) as server:
        sampled(str(path), tmp_path / "s", server.url)
    words = ("--verifier", "exact", "--marker", "####", "--keep", "all", "--out")
    assert command("verify", tmp_path / "s", *words, tmp_path / "k.jsonl") == 0
    assert "6 × prompt without a reference answer" in capsys.readouterr().out
    assert {row["reward"] for row in lines(tmp_path / "k.jsonl")} == {0.0}


def test_a_dead_server_is_one_line_and_status_2(prompts, tmp_path, capsys):
    with serving(lambda n, body: calculator(n, body) if n < 9 else (403, b"")) as server:
        assert sampled(prompts, tmp_path / "s", server.url, "--concurrency", "1") == 2
        server.behave = calculator
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and "what it answered is stored" in error
        assert len(read_samples(tmp_path / "s")) == 9
        assert sampled(prompts, tmp_path / "s", server.url) == 0
    assert len(read_samples(tmp_path / "s")) == 48


def test_missing_samples_give_status_1(prompts, tmp_path, capsys):
    def behave(number, body):
        return (400, b"") if body["messages"][-1]["content"] == "3+1" else calculator(number, body)

    with serving(behave) as server:
        assert sampled(prompts, tmp_path / "s", server.url) == 1
    error = capsys.readouterr().err
    assert "6 × answer refused with HTTP 400" in error and "6 samples are missing" in error
    summary = json.loads((tmp_path / "s" / "summary.0-of-1.json").read_text())
    assert summary["missing"] == 6 and summary["samples"] == 42


def test_kill_9_in_the_middle_of_the_command(model, prompts, tmp_path):
    """The program itself is killed once its first samples are stored, and started again."""
    words = ["sample", "--model", model, "--prompts", prompts, *COLUMNS, "--samples", "4"]
    words += ["--max-tokens", "24", "--batch-size", "2", "--device", "cpu"]
    assert command(*words, "--out", tmp_path / "unbroken") == 0
    killed = tmp_path / "killed"
    program = [sys.executable, "-m", "megatron_dft.cli", *words, "--out", str(killed)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = killed / "samples.0-of-1.jsonl"
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(read_samples(killed))
    assert 0 < before
    assert command(*words, "--out", killed) == 0
    assert read_samples(killed) == read_samples(tmp_path / "unbroken")
    assert len(file.read_text().splitlines()) == 32


def test_evaluate_several_models_on_several_sets(prompts, tmp_path, capsys):
    with serving(calculator, models=("good", "bad")) as server:
        good = server.behave

        def behave(number, body):
            status, reply = good(number, body)
            if body["model"] == "bad":
                reply["choices"][0]["message"]["content"] = "#### -1"
            return status, reply

        server.behave = behave
        second = tmp_path / "second.jsonl"
        second.write_text(json.dumps({"question": "40+2", "gold": 42}) + "\n")
        words = ["evaluate", "--models", "old=bad", "new=good", "--sets", prompts, f"two={second}"]
        words += ["--endpoint", server.url, "--samples", 4, "--out", tmp_path / "e", *COLUMNS]
        words += ["--verifier", "exact", "--marker", "####"]
        assert command(*words) == 0
        asked = server.asked
        assert command(*words) == 0  # everything is there: scores again, nothing asked
        assert server.asked == asked == 72
    result = json.loads((tmp_path / "e" / "scores.json").read_text())
    samples = read_samples(tmp_path / "e" / "samples" / "new" / "prompts")
    right = [s["seed"] % 2 for s in samples]
    first = sum(right[::4])
    new = result["scores"]["new"]["prompts"]
    assert new["avg@4"]["value"] == pytest.approx(sum(right) / 32)
    assert new["pass@1"]["value"] == first / 8
    assert new["pass@1"]["low"] == pytest.approx(wilson(first, 8).low)
    assert (new["prompts"], new["samples"], new["cut off"]) == (8, 4, 0)
    assert result["scores"]["old"]["two"]["avg@4"]["value"] == 0
    gain = result["gains"]["new over old"]["prompts"]
    assert gain["value"] == pytest.approx(sum(right) / 32) and gain["low"] > 0
    assert list(result["gains"]["new over old"]) == ["prompts", "two", "mean"]
    of_two = result["scores"]["new"]["two"]["avg@4"]["value"]
    mean = result["scores"]["new"]["mean"]["avg@4"]["value"]
    assert mean == pytest.approx((sum(right) / 32 + of_two) / 2)
    said = capsys.readouterr().out
    assert "avg@4" in said and "maj@4" in said and "new over old" in said
    assert (tmp_path / "e" / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_checkpoints_in_parts(model, prompts, tmp_path):
    words = ["evaluate", "--models", f"only={model}", "--sets", prompts, "--samples", 2, *COLUMNS]
    words += ["--max-tokens", 8, "--verifier", "regex", "--pattern", r"\d+", "--device", "cpu"]
    for part in ("0/2", "1/2"):
        assert command(*words, "--out", tmp_path / "parts", "--part", part) == 0
        assert not (tmp_path / "parts" / "scores.json").exists()
    assert command(*words, "--out", tmp_path / "parts") == 0
    assert command(*words, "--out", tmp_path / "whole") == 0
    found = [json.loads((tmp_path / d / "scores.json").read_text()) for d in ("parts", "whole")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["sample", "--samples", "0"], "--samples"),
        (["sample", "--part", "2/2"], "--part 2/2"),
        (["sample", "--part", "x"], "--part 'x'"),
        (["sample", "--columns", "x=y"], "--columns 'x=y'"),
        (["sample", "--backend", "vllm"], "--backend vllm: it is not installed"),
        (["sample", "--device", "cuda"], "--device cuda: no GPU is there"),
        (["sample", "--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (["sample", "--batch-size", "0"], "--batch-size"),
        (["sample", "--chat-template-args", "[]"], "--chat-template-args"),
        (["sample", "--chat-template", "/none"], "--chat-template"),
        (["sample", "--raw", "--system", "s"], "--raw and --system"),
        (["sample", "--endpoint", "x", "--chat-template-args", "{}"], "--chat-template-args"),
        (["sample", "--endpoint", "http://x", "--backend", "vllm"], "leave one out"),
        (["sample", "--model", "/no/such/model"], "--model '/no/such/model' cannot be loaded"),
        (["sample", "--prompts", "/no/such.jsonl"], "--prompts '/no/such.jsonl' does not exist"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    words, text, model, prompts, tmp_path, capsys
):
    given = ["--model", model, "--prompts", prompts, "--out", tmp_path / "out", *words[1:]]
    assert command("sample", *given) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and text in error, error
    assert not (tmp_path / "out").exists()


def test_mistakes_of_verify_and_evaluate(prompts, tmp_path, capsys):
    verify = ("verify", "--out", tmp_path / "k.jsonl", "--verifier")
    for words, text in (
        ((*verify, "exact", tmp_path), "expected a directory that `megatron-dft sample` wrote"),
        ((*verify, "regex", tmp_path), "--verifier regex needs --pattern"),
        ((*verify, "exact", tmp_path, "--per-prompt", 0), "--per-prompt"),
        (("verify", tmp_path, "--verifier", "exact", "--out", "/no/x"), "does not exist"),
    ):
        assert command(*words) == 2
        assert text in capsys.readouterr().err
    two = ["a/m", "b/m"]
    evaluate = ["evaluate", "--verifier", "exact", "--out", tmp_path / "e", "--sets", prompts]
    assert command(*evaluate, "--models", *two) == 2
    assert "the name 'm' is taken" in capsys.readouterr().err
