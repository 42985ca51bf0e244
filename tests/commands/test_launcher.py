"""`megatron-dft train`'s launcher: environment, statuses, signals, and no rank left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dft.commands import launcher

START = """
import sys
from megatron_dft.commands import launcher
launcher._CRASH_SECONDS = 0.0
sys.exit(launcher.main("tests.commands.fake_rank", sys.argv[1:]))
"""


def start(word: str, directory: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", START, word, str(directory), *words],
        env=plain | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(paths: list[Path]) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_every_rank_has_its_number_and_all_meet_at_one_port(tmp_path):
    process = start("end", tmp_path, "--nproc-per-node", "3")
    assert process.communicate() == ("", "") and process.returncode == 0
    found = [(tmp_path / f"env-{rank}").read_text().split() for rank in range(3)]
    assert [one[:2] for one in found] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert len({one[2] for one in found}) == 1


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("refuse", 2, "error: --lr\n"),
        ("crash", 3, ""),
        ("killed", 137, "error: rank 1 was ended by SIGKILL\n"),
    ],
)
def test_the_first_failure_is_the_status_and_the_others_end(tmp_path, word, status, said):
    process = start(word, tmp_path, "--nproc_per_node=2")
    assert process.communicate(timeout=60) == ("", said)
    assert process.returncode == status


def test_a_signal_reaches_every_rank(tmp_path):
    process = start("stop", tmp_path, "--nproc-per-node", "2")
    until([tmp_path / "ready-0", tmp_path / "ready-1"])
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()


def test_a_second_interrupt_ends_ranks_that_do_not_hear_the_first(tmp_path):
    process = start("deaf", tmp_path, "--nproc-per-node", "2")
    until([tmp_path / "ready-0", tmp_path / "ready-1"])
    process.send_signal(signal.SIGINT)
    until([tmp_path / "heard-0", tmp_path / "heard-1"])
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path):
    process = start("orphan", tmp_path, "--nproc-per-node", "2")
    until([tmp_path / "ready-0", tmp_path / "ready-1"])
    ranks = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while not all(map(gone, ranks)) and time.monotonic() < end:
        time.sleep(0.02)
    assert all(map(gone, ranks))


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--nproc-per-node", "0"], {}, "--nproc-per-node: expected a whole number above 0, got"),
        (["--nproc-per-node", "gpu"], {}, "got 'gpu'"),
        (["--nproc-per-node", "9"], {"CUDA_VISIBLE_DEVICES": "0,1"}, "of which there are 2, got 9"),
        (["--nproc-per-node", "2"], {"RANK": "1"}, "another launcher has started"),
    ],
)
def test_a_number_of_ranks_that_cannot_be(tmp_path, words, environment, said):
    process = start("end", tmp_path, *words, **environment)
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert said in err and err.count("\n") == 1


def test_the_flag_is_taken_out_of_the_words():
    flag = launcher.FLAG
    assert launcher.take(flag, ["--a", "--nproc-per-node", "4", "b"]) == ("4", ["--a", "b"])
    assert launcher.take(flag, ["--nproc_per_node=gpu"]) == ("gpu", [])
    assert launcher.take(flag, ["--a"]) == (None, ["--a"])
