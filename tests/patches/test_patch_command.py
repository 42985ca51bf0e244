"""`megatron-dft patch` on checkouts that the tests write, and the shipped diffs as files."""

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_dft import stock_run
from megatron_dft.commands import patch as patch_command
from tests.patches.forks import (
    CHANGED_PLACES,
    DRIVER,
    FORKS,
    HEAD,
    ROOT,
    SHIPPED,
    UNEDITED,
    patch,
    refusal,
    written,
)
from tests.patches.stand_in import SCRIPT, patched, write_checkout, write_diff


@pytest.fixture
def diff(tmp_path, monkeypatch):
    path = write_diff(tmp_path / "patches" / "stand-in.diff", SCRIPT, patched(SCRIPT))
    monkeypatch.setattr(patch_command, "DIRECTORIES", (path.parent,))
    return path


@pytest.fixture
def checkout(tmp_path, diff):
    return write_checkout(tmp_path / "Megatron-LM")


def test_apply_check_and_revert_are_exact_and_idempotent(checkout, capsys):
    script = checkout / "pretrain_gpt.py"
    script.chmod(0o751)
    files = sorted(os.listdir(checkout))
    for flags, content, word in (
        (["--check"], SCRIPT, "would apply"),
        ([], patched(SCRIPT), "as checked for stand-in, megatron-core 0.19) applied"),
        ([], patched(SCRIPT), "was applied before"),
        (["--check"], patched(SCRIPT), "is applied"),
        (["--revert"], SCRIPT, "taken out"),
        (["--revert"], SCRIPT, "is not applied"),
    ):
        assert patch(checkout, *flags) == 0
        assert script.read_text() == content
        assert word in capsys.readouterr().out.splitlines()[0]
    assert script.stat().st_mode & 0o777 == 0o751
    assert sorted(os.listdir(checkout)) == files


def test_a_second_call_does_not_rewrite_the_file(checkout):
    script = checkout / "pretrain_gpt.py"
    patch(checkout)
    node = script.stat().st_ino
    patch(checkout)
    patch(checkout, "--check")
    assert script.stat().st_ino == node


def test_a_link_to_the_script_stays_a_link(checkout, tmp_path):
    script = checkout / "pretrain_gpt.py"
    target = tmp_path / "elsewhere.py"
    script.rename(target)
    script.symlink_to(target)
    patch(checkout)
    assert script.is_symlink() and target.read_text() == patched(SCRIPT)


def test_a_write_that_fails_leaves_the_file_and_nothing_else(checkout, capsys, monkeypatch):
    files = sorted(os.listdir(checkout))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    message = refusal(capsys, checkout)
    assert "--megatron-lm" in message and "No space left on device" in message
    assert sorted(os.listdir(checkout)) == files


@pytest.mark.parametrize("name", FORKS)
def test_forks_with_edits_beside_the_places(checkout, capsys, name):
    script = checkout / "pretrain_gpt.py"
    content = written(FORKS[name], SCRIPT)
    script.write_bytes(content)
    assert patch(checkout, "--check") == 0 and "would apply" in capsys.readouterr().out
    assert patch(checkout) == 0 and "found by its syntax" in capsys.readouterr().out
    ours = script.read_bytes().splitlines(keepends=True)
    end = b"\r\n" if name == "of Windows" else b"\n"
    added = [line for line in ours if b"weighted_loss" in line or b"with_loss_flags" in line]
    assert len(added) == 3 and all(line.endswith(end) for line in added)
    assert added[0].startswith(b"from megatron_dft.stock import")
    decorator = ours.index(b"@weighted_loss" + end)
    assert ours[decorator + 1].startswith(b"def loss_func(")
    assert compile(b"".join(ours), "x", "exec")
    assert patch(checkout, "--revert") == 0 and script.read_bytes() == content
    patch(checkout)
    script.write_bytes(script.read_bytes() + b"\n# more\n")  # an edit after the patch
    patch(checkout, "--revert")
    assert script.read_bytes() == content + b"\n# more\n"


@pytest.mark.parametrize("flags", [[], ["--check"]])
@pytest.mark.parametrize("name", CHANGED_PLACES)
def test_a_changed_place_is_refused_with_the_lines_to_add(checkout, capsys, name, flags):
    change, expected = CHANGED_PLACES[name]
    (checkout / "pretrain_gpt.py").write_text(change(SCRIPT))
    message = refusal(capsys, checkout, *flags)
    assert expected in message
    for line in ("from megatron_dft.stock import", "@weighted_loss", "= with_loss_flags("):
        assert line in message


@pytest.mark.parametrize("missing", ["pretrain_gpt.py", "megatron/core/package_info.py"])
def test_what_is_no_checkout_is_refused(checkout, capsys, missing):
    (checkout / missing).unlink()
    assert "expected a Megatron-LM checkout" in refusal(capsys, checkout)


def test_a_missing_directory_is_refused(tmp_path, diff, capsys):
    assert "expected a Megatron-LM checkout" in refusal(capsys, tmp_path / "none")


def test_a_diff_that_was_changed_is_refused(checkout, diff, capsys):
    text = diff.read_text()
    after = text.split("..")[1][:40]
    diff.write_text(text.replace(after, "0" * 40))
    assert "restore it" in refusal(capsys, checkout)
    diff.write_text(text.replace("index ", "xindex "))
    assert "restore it" in refusal(capsys, checkout)


def test_without_the_diffs_the_places_are_found_all_the_same(checkout, diff, capsys):
    diff.unlink()
    assert patch(checkout) == 0
    assert (checkout / "pretrain_gpt.py").read_text() == patched(SCRIPT)
    assert "found by its syntax" in capsys.readouterr().out


def test_the_patched_script_trains_on_the_objective_and_imports_little(checkout):
    patch(checkout)
    command_lines = (
        ["--of-the-script", "3"],
        ["--loss", "dft"],
        ["--loss", "dft", "--fp16-lm-cross-entropy"],
    )
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([str(checkout), *command_lines])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"},
    )
    assert done.returncode == 0, done.stderr
    plain, announced, weighted, refused, ours, megatron = done.stdout.splitlines()

    # p·CE and p by hand, for CE = 0.1, 0.7, 5 and 9.
    p = [0.9048374180359595, 0.4965853037914095, 0.006737946999085467, 0.00012340980408667956]
    ce = [0.1, 0.7, 5.0, 9.0]
    loss, count, gradient, report, args = json.loads(plain)
    assert loss == pytest.approx(sum(ce)) and count == 4
    assert gradient == [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]] and report.keys() == {"lm loss"}
    assert args["loss"] == "sft" and args["of_the_script"] == 3

    assert announced == "> megatron_dft: training loss dft (arXiv 2508.05629)"
    loss, count, gradient, report, args = json.loads(weighted)
    assert loss == pytest.approx(sum(x * y for x, y in zip(p, ce, strict=True)), rel=1e-6)
    assert count == 4 and args["of_the_script"] == 0
    assert gradient[0] == pytest.approx([p[0], p[1], 0.0], rel=1e-6)
    assert gradient[1] == pytest.approx([p[2], 0.0, p[3]], rel=1e-6)
    assert report["lm loss"] == pytest.approx([sum(ce), 4], rel=1e-6)
    assert report["dft loss"] == pytest.approx([loss, 4])
    assert report["dft/mean-prob"] == pytest.approx([sum(p), 4], rel=1e-6)

    assert json.loads(refused).startswith("--fp16-lm-cross-entropy: ")
    assert json.loads(ours) == [] and json.loads(megatron) == ["megatron.training"]


def test_the_unedited_script_runs_with_the_objective(checkout):
    """stock_run: the same figures as the patched script; the file and its lines as they were."""
    script = checkout / "pretrain_gpt.py"
    fails, other = checkout / "fails.py", checkout / "patched.py"
    fails.write_text(SCRIPT.replace("loss_mask.sum()", "1 / 0 + loss_mask.sum()"))
    other.write_text(patched(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-c", UNEDITED, script, other, other, fails],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{checkout}", "RANK": "1"},
    )
    assert done.returncode == 0, done.stderr
    unedited, through_us, plain, *error = done.stdout.splitlines()
    assert unedited == through_us == plain and "dft loss" in plain
    assert script.read_text() == SCRIPT
    line = 1 + SCRIPT[: SCRIPT.index("loss_mask.sum()")].count("\n")
    assert any(f'fails.py", line {line}, in loss_func' in one for one in error)


def test_what_stock_run_cannot_run_is_one_line(checkout, capsys):
    script = checkout / "pretrain_gpt.py"
    script.write_text(SCRIPT.replace(HEAD, "output_tensor, loss_mask, model=None\n"))
    for words, expected in (
        ([str(script), "--loss", "dft"], "megatron-dft patch"),
        (["none.py"], "expected a script, got none.py"),
        ([], ""),
    ):
        assert stock_run.main(words) == 2
        out, err = capsys.readouterr()
        assert expected in err and (out + err).count("\n") == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_diff_holds_our_three_lines_and_nothing_else(path):
    text = path.read_text()
    core = re.search(r"^Megatron-Core: (\S+)", text, re.MULTILINE)[1]
    entry = "parse_and_validate_args" if core >= "0.18" else "pretrain"
    added = [line[1:] for line in text.splitlines() if line.startswith("+") and "+++" not in line]
    assert added == [
        "from megatron_dft.stock import weighted_loss, with_loss_flags",
        "@weighted_loss",
        f"    {entry} = with_loss_flags({entry})",
    ]
    head = text.splitlines()
    assert head[0].startswith(f"Release: {path.stem} (checked at ")
    assert len(head) == 7 + 2 * 3 and all(line.endswith(" @@") for line in head[7::2])


def test_every_release_has_its_diff():
    found = [patch_command.read_known(path) for path in SHIPPED]
    assert {one.release for one in found} == {
        "core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_r0.19.0", "main",
    }  # fmt: skip
    assert len({digest for one in found for digest in (one.before, one.after)}) == 10
