"""`megatron-dft train` as a person starts it: what the terminal shows, on two ranks."""

import os
import subprocess
import sys

import pytest

from tests.train.launch import flags


@pytest.fixture
def door():
    """door(*words) → the ended process of `megatron-dft train --nproc-per-node 2 WORDS`."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    plain = {k: v for k, v in os.environ.items() if k not in names}

    def start(*words):
        return subprocess.run(
            [sys.executable, "-m", "megatron_dft.cli", "train", "--nproc-per-node", "2", *words],
            capture_output=True,
            text=True,
            env=plain | {"CUDA_VISIBLE_DEVICES": ""},
        )

    return start


def test_ten_steps_on_two_ranks_are_few_lines(tiny_model, chats, tmp_path, door):
    save = tmp_path / "ckpt"
    done = door(
        *flags(
            tiny_model,
            chats,
            train_iters=10,
            save=save,
            save_interval=5,
            valid_data=chats,
            eval_interval=5,
            tensor_model_parallel_size=2,
        )
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 40, done.stdout + done.stderr
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert first.startswith("> loss: dft (arXiv 2508.05629), the default")
    assert last == f"> finished: step 10 of 10; checkpoint in {save}"
    for step in range(1, 11):
        assert sum(line.startswith(f"step {step}/10 |") for line in lines) == 1
    assert "> evaluation: 48 rows of --valid-data, whole, every 5 steps and at the end" in lines
    evaluated = [line for line in lines if line.startswith("evaluation after step ")]
    assert [line.split()[3] for line in evaluated] == ["5", "10"] and "| end p 0." in evaluated[0]
    log = (save / "megatron.log").read_text()
    assert log.count(" tensor_model_parallel_size ....") == 1  # Megatron's arguments, once
    assert "iteration       10/" in log and "step 10/10" in log
    assert "mean-prob PPL" not in log


def test_a_wrong_flag_on_two_ranks_is_one_line(tiny_model, chats, tmp_path, door):
    save = tmp_path / "ckpt"
    words = flags(tiny_model, chats, save=save, save_interval=5)
    done = door(*words, "--sequnce-length", "64")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: unrecognized arguments: --sequnce-length 64; did you mean --seq-length?\n"
    )
    assert not save.exists()
