"""The GPU suite on a machine without one: it says so, its plan is sound, its judgement can fail."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import check, plan, suite

ROOT = Path(__file__).parents[2]
EVERY = [run for runs in plan.SECTIONS.values() for run in runs]


def _run_sh(*words):
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "tests/gpu/run.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path):
    done = _run_sh("--out", str(tmp_path), "start")
    assert done.returncode == 3 and "no GPU is visible" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_every_command(tmp_path):
    done = _run_sh("--out", str(tmp_path), "--dry-run", *plan.SECTIONS)
    assert done.returncode == 0, done.stderr
    for run in EVERY:
        assert re.search(rf"^{re.escape(run.name)}: .*tests\.gpu\.launch", done.stdout, re.M)
    assert "tests.gpu.objectives" in done.stdout


def test_a_section_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["suite", str(tmp_path), "--dry-run", "parities"])
    assert suite.main() == 2 and "parities" in capsys.readouterr().err


def test_seven_minutes_at_most():
    default = ("start", "parity", "heads", "train")
    assert sum(plan.LIMITS[name] for name in default) <= 7 * 60


def test_references_and_predecessors_are_in_the_plan():
    names = [run.name for run in EVERY]
    assert len(names) == len(set(names))
    for run in EVERY:
        assert {*run.after, *([run.like] if run.like else [])} <= set(names), run.name


def test_every_flag_is_one_of_the_training_command_s():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dft.flags import resolve

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    resolve.define(parser, scoring=False)
    known = parser._option_string_actions
    for run in EVERY:
        for word in plan.command_line(run, Path("/work")):
            assert not word.startswith("--") or word in known, (run.name, word)


@pytest.fixture
def figures(tmp_path):
    """figures(name, lm losses) writes what a run of that name would have."""
    (tmp_path / "figures").mkdir()

    def write(name, losses, norm=1.0):
        rows = [{"step": i + 1, "lm loss": x, "grad_norm": norm} for i, x in enumerate(losses)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "figures" / f"{name}.jsonl").write_text(text)
        return tmp_path

    return write


RUN = plan.Run("te", like="cpu")


@pytest.mark.parametrize(
    ("losses", "norm", "holds"),
    [
        ([5.0, 4.0], 1.0, True),
        ([5.00001, 4.0004], 1.000001, True),
        ([5.001, 4.0], 1.0, False),  # the first step
        ([5.0, 4.01], 1.0, False),  # a later one
        ([5.0, 4.0], 1.01, False),  # the gradient
    ],
)
def test_a_run_is_held_to_its_reference(figures, losses, norm, holds):
    figures("cpu", [5.0, 4.0])
    work = figures("te", losses, norm)
    assert check.judge(RUN, 0, "", work)[0] is holds


def test_a_run_that_ends_otherwise_fails(figures):
    work = figures("cpu", [5.0])
    assert not check.judge(RUN, 0, "", work)[0]  # no figures
    figures("te", [5.0])
    assert not check.judge(RUN, 1, "RuntimeError: no", work)[0]
    says = plan.Run("te", says=("machine:",))
    assert not check.judge(says, 0, "nothing", work)[0]
    assert check.judge(says, 0, "> machine: H100", work)[0]
    refused = plan.Run("x", status=2, says=("--no-packing",))
    assert check.judge(refused, 2, "error: --no-packing: expected", work)[0]
    assert not check.judge(refused, 0, "--no-packing", work)[0]


def test_the_training_benchmark_s_goals():
    log = "".join(f"elapsed time per iteration (ms): {t}\n" for t in [9000, *[600.0] * 9])
    assert check.step_ms(log) == 600.0 and check.step_ms("") is None
    # 1.54 B weights, 16,384 tokens a step: 0.6 s at 790 TFLOPS.
    assert check.share("1.5b", 600.0, 790.0) == pytest.approx(0.32, abs=0.01)
    slow = {"plain-ce": 600.0, "dft": 640.0, "dft-chunk": 400.0, "8b-dft-chunk": None}
    rows = {row["name"]: row["holds"] for row in check.judge_training(slow, 790.0)}
    assert rows == {
        "train dft": False,
        "train dft-chunk": True,
        "train 8b-dft-chunk": False,
        "train dft over plain cross entropy": False,
    }


def test_the_table_and_the_results_of_a_section(tmp_path, monkeypatch, capsys):
    """A section of stand-ins: one holds, one fails, one waits for the first."""
    runs = [
        plan.Run("late", after=("good",)),
        plan.Run("good", says=("hello",)),
        plan.Run("bad", status=0),
        plan.Run("tried", counts=False),
    ]
    monkeypatch.setitem(suite.SECTIONS, "start", runs)
    monkeypatch.setattr(suite.Suite, "models", lambda self, runs: None)

    def command(run, work):
        status = int(run.name in ("bad", "tried"))
        text = f"import sys; print('hello'); sys.exit({status})"
        return [sys.executable, "-c", text]

    monkeypatch.setattr(suite, "command", command)
    monkeypatch.setattr(sys, "argv", ["suite", str(tmp_path), "start"])
    assert suite.main() == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"]: row["holds"] for row in content["rows"]} == {
        "late": True, "good": True, "bad": False, "tried": False
    }  # fmt: skip
    assert "failed: ['bad']" in capsys.readouterr().out
