"""What reaches the terminal and what reaches the log, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from megatron_dft import cli
from megatron_dft.storage import terminal

PROGRAM = """
import os, sys, warnings
from pathlib import Path
from megatron_dft.storage import terminal
terminal.divert()
os.write(2, b"C code\\n")
warnings.warn("a library")
print("early")
terminal.head("the first line")
if sys.argv[1] == "refused":
    terminal.fail("--lr")
    sys.exit(2)
terminal.settle(Path(sys.argv[1]) if sys.argv[1] != "-" else None, first=sys.argv[2] == "first")
print("late")
terminal.say("step 1")
terminal.warn("warning: w")
print("error", file=sys.stderr)
"""


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_only_what_is_said_reaches_the_terminal(tmp_path):
    done = run(tmp_path / "new" / "log", "first")
    assert (done.stdout, done.stderr) == ("the first line\nstep 1\n", "warning: w\n")
    log = (tmp_path / "new" / "log").read_text()
    for text in ("C code", "a library", "early", "late", "the first line", "step 1", "error"):
        assert log.count(text) == 1, text


def test_the_early_lines_of_other_ranks_are_left_out_and_an_old_log_stays(tmp_path):
    (tmp_path / "log").write_text("before\n")
    run(tmp_path / "log", "other")
    log = (tmp_path / "log").read_text()
    assert log.startswith("before\nlate\n") and "early" not in log


def test_a_refusal_is_one_line(tmp_path):
    done = run("refused")
    assert (done.stdout, done.stderr, done.returncode) == ("", "error: --lr\n", 2)


def test_all_of_it_on_the_terminal():
    done = run("-", "first")
    assert "late\nthe first line\nstep 1\n" in done.stdout
    assert "C code\n" in done.stderr and "early" in done.stderr


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "other")
    run(tmp_path / "log", "first")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("world", "local", "prefixed"), [("4", "4", False), ("4", "2", True)])
def test_the_host_is_named_where_there_are_several(world, local, prefixed, tmp_path):
    done = run(tmp_path / "log", "first", WORLD_SIZE=world, LOCAL_WORLD_SIZE=local)
    assert done.stderr.endswith("warning: w\n")
    assert (done.stderr != "warning: w\n") == prefixed


HOSTILE, SHOWN = "a\x1b]52;c;eA==\x07\r\x9b2J\u202eé", "a\\x1b]52;c;eA==\\x07\\r\\x9b2J\\u202eé"


@pytest.mark.parametrize("tell", [terminal.say, terminal.warn, terminal.fail, terminal.say_once])
def test_what_is_said_does_not_steer_the_terminal(tell, capsys):
    tell(f"{HOSTILE}\tb")
    out, error = capsys.readouterr()
    assert (out + error).removeprefix("error: ") == f"{SHOWN}\tb\n"


def test_neither_does_what_a_file_says_to_a_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": HOSTILE + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, ensure_ascii=False))
    assert cli.main(["drift", str(tmp_path), str(tmp_path / HOSTILE)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable(), said
