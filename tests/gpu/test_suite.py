"""The GPU suite on a machine without one: it says so, its plan is sound, its judgement can fail."""

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu import check, commands, lines, plan, processes, rehearsal, suite

ROOT = Path(__file__).parents[2]
EVERY = list(lines.EVERY.values())


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
    done = _run_sh("--out", str(tmp_path), "--dry-run", *lines.SECTIONS)
    assert done.returncode == 0, done.stderr
    for run in EVERY:
        what = run.program[0] if run.program else "tests.gpu.launch"
        assert re.search(rf"^{re.escape(run.name)}: .*{re.escape(what)}", done.stdout, re.M)
    assert "tests.gpu.objectives" in done.stdout and "tests.gpu.values" in done.stdout


def test_a_section_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["suite", str(tmp_path), "--dry-run", "parities"])
    assert suite.main() == 2 and "parities" in capsys.readouterr().err


def test_seven_minutes_at_most():
    assert plan.WHOLE <= 7 * 60
    assert sum(plan.LIMITS[name] for name in plan.DEFAULT) <= plan.WHOLE


def test_references_and_predecessors_are_in_the_plan():
    names = [run.name for run in EVERY]
    assert len(names) == len(set(names))
    for run in EVERY:
        assert set(run.awaited) <= set(names), run.name


def test_a_run_loads_what_another_has_saved():
    saved = {run.flags["save"]: run.name for run in EVERY if "save" in run.flags}
    for run in EVERY:
        if "load" in run.flags:
            assert saved[run.flags["load"]] in run.after, run.name


def test_a_section_alone_has_what_its_runs_are_compared_with(tmp_path, monkeypatch):
    seen = []
    alone = suite.Suite(tmp_path, until=1e12)
    monkeypatch.setattr(alone, "run", lambda section, run, until: seen.append(run.name))
    alone.together("try", lines.TRY, until=1e12)
    assert {"cpu", "cpu-unpacked"} <= set(seen) and len(seen) == len(set(seen))


def test_every_objective_is_among_the_checked_values():
    from megatron_dft.losses import registry
    from tests.gpu import values
    from tests.step.stand_in import CASES

    assert {name.split("/")[0] for name in values.PARAMETERS} == set(registry.OBJECTIVES)
    assert set(registry.OBJECTIVES) <= set(CASES)


@pytest.mark.parametrize("route", ["logits", "head"])
def test_the_values_of_every_objective_on_this_device(route):
    from tests.gpu import values

    for what, error in values.errors("cpu")[route].items():
        assert error <= values.BOUND, what


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


RUN, CPU = plan.Run("te", like="cpu"), plan.Run("cpu")


@pytest.mark.parametrize(
    ("losses", "norm", "holds"),
    [
        ([5.0, 4.0], 1.0, True),
        ([5.00001, 4.0001], 1.000001, True),
        ([5.001, 4.0], 1.0, False),  # the first step
        ([5.0, 4.01], 1.0, False),  # a later one
        ([5.0, 4.0], 1.01, False),  # the gradient
    ],
)
def test_a_run_is_held_to_its_reference(figures, losses, norm, holds):
    figures("cpu", [5.0, 4.0])
    work = figures("te", losses, norm)
    assert check.judge(RUN, 0, "", work)[0] is holds


def test_a_run_that_should_go_on_and_begins_anew_fails(figures):
    work = figures("cpu", [5.0, 4.0])
    figures("te", [5.0, 4.0])
    resumed = plan.Run("te", flags=dict(load="WORK/ck"), like="cpu")
    assert check.judge(resumed, 0, "", work) == (
        False, "does not go on from the checkpoint: it begins at step 1"
    )  # fmt: skip


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


def _export(directory, value, moved):
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    tensors = {"a": torch.zeros(4), "b": torch.full((4,), value)}
    save_file({n: t + moved.get(n, 0.0) for n, t in tensors.items()}, directory / "m.safetensors")


@pytest.mark.parametrize(("of_b", "holds"), [(0.1, True), (0.1001, True), (0.0, False)])
def test_exported_weights_are_compared_by_what_training_moved(figures, of_b, holds):
    """A tensor without its gradient: nothing beside its size, and all of its update."""
    figures("cpu", [5.0])
    work = figures("te", [5.0])
    (work / "logs").mkdir()
    (work / "logs" / "cpu.log").write_text("")
    _export(work / "llama" / "model", 100.0, {})
    _export(work / "out" / "cpu", 100.0, {"a": 0.1, "b": 0.1})
    _export(work / "out" / "te", 100.0, {"a": 0.1, "b": of_b})
    runs = [plan.Run(n, flags=dict(save_hf=f"WORK/out/{n}"), like=k)
            for n, k in (("te", "cpu"), ("cpu", None))]  # fmt: skip
    assert check.judge(runs[0], 0, "", work, runs[1])[0] is holds


@pytest.mark.parametrize(("norm", "holds"), [("0.5", True), ("0.6", False), (None, False)])
def test_the_drift_is_compared(figures, norm, holds):
    figures("cpu", [5.0])
    work = figures("te", [5.0])
    (work / "logs").mkdir()
    line = "drift at step 4: norm {}, relative 0.01, unchanged at bf16 0.1\n"
    (work / "logs" / "cpu.log").write_text(line.format("0.5"))
    log = "" if norm is None else line.format(norm)
    assert check.judge(RUN, 0, log, work, CPU)[0] is holds


def _read(reader, size):
    """What comes within 30 s, b"" at the pipe's end."""
    return os.read(reader, size) if select.select([reader], [], [], 30)[0] else None


def test_a_process_ends_with_all_that_it_started(tmp_path):
    """A pipe ends when the last process that could write to it has."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    text = "import os, time; f = open('pipe', 'wb', 0); os.fork(); f.write(b'x'); time.sleep(99)"
    words = [sys.executable, "-c", text]
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(processes.run, words, tmp_path / "log", 99, tmp_path, dict(os.environ))
        assert _read(reader, 1) == _read(reader, 1) == b"x"
        processes.end_all()
        assert run.result(30) == -signal.SIGKILL and _read(reader, 1) == b""


def test_a_rehearsal_is_on_the_cpu_and_small():
    for run in EVERY:
        here = rehearsal.here(run)
        assert here.flags["device"] == "cpu" and here.like == run.like
        assert here.flags.get("seq_length", 128) == 128
    (dft,) = (run for run in EVERY if run.name == "dft")
    assert "--fusion" in rehearsal.here(dft).launch
    assert "--gate" in commands.launch_words(rehearsal.here(dft), Path("/work"))
    (cpu,) = (run for run in EVERY if run.name == "cpu")
    assert rehearsal.here(cpu) == cpu


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
        "train dft-drift-anchor": False,  # not timed
        "train asft-reference": False,
        "train dft-megatron-ce": False,
    }
    (*_, goals) = check.judge_training(slow, None)
    assert goals["holds"] is False and "every run was timed: False" in goals["why"]


def test_the_table_and_the_results_of_a_section(tmp_path, monkeypatch, capsys):
    """A section of stand-ins: one holds, one fails, one hangs, one waits for the first."""
    runs = [
        plan.Run("hanging", limit=1),
        plan.Run("elsewhere", packages=("no_such_package",)),
        plan.Run("late", after=("good",)),
        plan.Run("good", says=("hello",)),
        plan.Run("bad", status=0),
        plan.Run("tried", counts=False),
        plan.Run("unreadable", like="good"),
    ]
    monkeypatch.setitem(suite.SECTIONS, "start", runs)
    monkeypatch.setattr(suite.Suite, "begin_models", lambda self, sections: None)

    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "unreadable.jsonl").write_text("{")

    def command(run, work):
        status = int(run.name in ("bad", "tried"))
        wait = 60 * (run.name == "hanging")
        text = f"import sys, time; time.sleep({wait}); print('hello'); sys.exit({status})"
        return [sys.executable, "-c", text]

    monkeypatch.setattr(suite, "command", command)
    monkeypatch.setattr(sys, "argv", ["suite", str(tmp_path), "start"])
    assert suite.main() == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"]: row["holds"] for row in content["rows"]} == {
        "late": True, "good": True, "bad": False, "tried": False, "hanging": False,
        "elsewhere": None, "unreadable": False,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert suite.main() == 2 and "another suite" in capsys.readouterr().err
    assert "1 skipped, failed: " in said and "the time is out" in said


def test_what_there_is_no_time_for_is_said(tmp_path, monkeypatch):
    late = suite.Suite(tmp_path, until=0.0)
    late.together("start", [plan.Run("one"), plan.Run("two", after=("one",))], until=1e12)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["why"] for row in content["rows"]] == ["not run: the time is out"] * 2
    assert content["all_hold"] is False
