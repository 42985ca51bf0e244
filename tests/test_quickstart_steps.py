"""examples/quickstart.sh repeats only what changed. The steps' programs are stand-ins here."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Answers for .venv/bin/python: notes each program it is asked for, and leaves that program's files.
FAKE_PYTHON = """#!/bin/bash
words="$*"
value() { local text=${words#*"$1" }; echo "${text%% *}"; }
case "$words" in
    *version_info*) exit 0 ;;
    --version) echo "Python 3.12.1" ;;
    "-m pip "*) ;;
    *model.py*) echo model >> calls; mkdir -p "$(value --out)" ;;
    *arithmetic.py*) mkdir -p "$(value --out)"; touch "$(value --out)"/{train,held_out}.jsonl ;;
    *evaluate.py*) echo "score $(value --model)" >> calls; touch "$(value --out)" ;;
    *"cli train"*)
        echo "train $(value --nproc-per-node) ${words##*--overwrite}" >> calls
        echo "step 1/80 | lm loss 1.0"
        [ ! -e broken ] || { echo "error: --lr: broken"; exit 2; }
        mkdir -p "$(value --save-hf)" ;;
    *table.py*) echo "THE TABLE" ;;
    *) exit 9 ;;
esac
"""


class Checkout:
    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        files = ["setup.py", "tools/setup_env.sh", "examples/quickstart.sh"]
        files += [
            f"examples/quickstart/{n}.py" for n in ("evaluate", "arithmetic", "model", "table")
        ]
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes((ROOT / name).read_bytes())
        python = self.root / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def run(self, *args):
        """The result, and the programs that this run called."""
        (self.root / "calls").unlink(missing_ok=True)
        result = subprocess.run(
            ["bash", str(self.root / "examples/quickstart.sh"), *args],
            cwd="/",
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        calls = self.root / "calls"
        return result, calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


BEFORE, AFTER = "score runs/quickstart/model", "score runs/quickstart/tuned"


def test_a_finished_run_is_kept_and_its_table_shown_again(checkout):
    result, calls = checkout.run()
    assert result.returncode == 0, result.stderr
    assert calls == ["model", BEFORE, "train 3  --device cpu", AFTER]
    assert "step 1/80" in result.stdout and "THE TABLE" in result.stdout
    again, calls = checkout.run()
    assert again.returncode == 0 and calls == ["model"]
    assert "training: kept" in again.stdout and "THE TABLE" in again.stdout


def test_another_objective_trains_and_scores_again_but_not_before(checkout):
    checkout.run()
    result, calls = checkout.run("--loss", "sft")
    assert result.returncode == 0
    assert calls == ["model", "train 3  --device cpu --loss sft", AFTER]


def test_changed_problems_are_scored_again_before_and_after(checkout):
    checkout.run()
    evaluate = checkout.root / "examples/quickstart/evaluate.py"
    evaluate.write_text(evaluate.read_text() + "\n# changed\n")
    _, calls = checkout.run()
    assert calls == ["model", BEFORE, AFTER]


def test_a_failed_training_shows_its_error_and_is_tried_again(checkout):
    (checkout.root / "broken").touch()
    result, calls = checkout.run()
    assert result.returncode == 1 and "--lr: broken" in result.stdout
    assert "training failed" in result.stderr and "THE TABLE" not in result.stdout
    (checkout.root / "broken").unlink()
    result, calls = checkout.run()
    assert result.returncode == 0
    assert calls == ["model", "train 3  --device cpu", AFTER]


def test_another_model_device_and_number_of_ranks(checkout):
    result, calls = checkout.run("--hf-model", "org/name", "--ranks", "2", "--device", "cuda")
    assert result.returncode == 0, result.stderr
    tuned = "score runs/quickstart-name/tuned"
    assert calls == ["score org/name", "train 2  --device cuda", tuned]


def test_help_needs_no_set_up_and_a_flag_its_value(checkout):
    result, calls = checkout.run("--help")
    assert result.returncode == 0 and "bash examples/quickstart.sh" in result.stdout
    assert calls == [] and "ready" not in result.stdout
    result, _ = checkout.run("--ranks")
    assert result.returncode == 1 and "--ranks: expected a value" in result.stderr
