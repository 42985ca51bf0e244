"""`megatron-dft patch` on checkouts that the tests write, and the shipped diffs as files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dft import cli
from megatron_dft.commands import patch as patch_command
from tests.patches.stand_in import SCRIPT, patched, write_checkout, write_diff

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "patches").glob("*.diff"))


@pytest.fixture
def diff(tmp_path, monkeypatch):
    path = write_diff(tmp_path / "patches" / "stand-in.diff", SCRIPT, patched(SCRIPT))
    monkeypatch.setattr(patch_command, "DIRECTORIES", (path.parent,))
    return path


@pytest.fixture
def checkout(tmp_path, diff):
    return write_checkout(tmp_path / "Megatron-LM")


def patch(checkout, *flags):
    return cli.main(["patch", "--megatron-lm", str(checkout), *flags])


def refusal(capsys, checkout, *flags):
    """The one line on standard error of a refused call, which must change nothing."""
    script = checkout / "pretrain_gpt.py"
    before = script.read_bytes() if script.exists() else None
    assert patch(checkout, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert before is None or script.read_bytes() == before
    return err


def test_apply_check_and_revert_are_exact_and_idempotent(checkout, capsys):
    script = checkout / "pretrain_gpt.py"
    script.chmod(0o751)
    files = sorted(os.listdir(checkout))
    for flags, content, word in (
        (["--check"], SCRIPT, "would apply"),
        ([], patched(SCRIPT), "applied"),
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


@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("allow_abbrev=False", ""), "was modified"),
        (lambda text: text.rstrip("\n"), "was modified"),
        (lambda text: text.replace("\n", "\r\n"), "was modified"),
        (lambda text: patched(text).replace("@weighted_loss\n", ""), "changed patch"),
        (lambda text: patched(text) + "# mine\n", "changed patch"),
    ],
)
def test_a_modified_script_is_refused(checkout, capsys, flags, change, expected):
    script = checkout / "pretrain_gpt.py"
    script.write_bytes(change(SCRIPT).encode())
    message = refusal(capsys, checkout, *flags)
    assert expected in message and "git checkout -- pretrain_gpt.py" in message


def test_a_release_without_a_diff_is_refused(tmp_path, diff, capsys):
    other = write_checkout(tmp_path / "other", version=(0, 15))
    message = refusal(capsys, other)
    assert "expected megatron-core 0.19 (stand-in), got 0.15" in message


@pytest.mark.parametrize("missing", ["pretrain_gpt.py", "megatron/core/package_info.py"])
def test_what_is_no_checkout_is_refused(checkout, capsys, missing):
    (checkout / missing).unlink()
    assert "expected a Megatron-LM checkout" in refusal(capsys, checkout)


def test_a_missing_directory_is_refused(tmp_path, diff, capsys):
    assert "expected a Megatron-LM checkout" in refusal(capsys, tmp_path / "none")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+@weighted_loss", "+@weighted_lass"),  # another line than the one that was checked
        ("@@ -10,0 +12 @@", "@@ -11,0 +13 @@"),  # another place
        ("@@ -10,0 +12 @@", "@@ -10 +12 @@"),  # a line of the original is replaced
        ("index ", "xindex "),
    ],
)
def test_a_diff_that_was_changed_is_refused(checkout, diff, capsys, old, new):
    text = diff.read_text()
    assert old in text
    diff.write_text(text.replace(old, new))
    assert "restore it" in refusal(capsys, checkout)


def test_no_diffs_at_all_says_where_they_were_looked_for(checkout, diff, capsys):
    diff.unlink()
    assert str(diff.parent) in refusal(capsys, checkout)


# Imports what the stand-in checkout has, torch and megatron_dft: 0.16's wheel has no more.
DRIVER = """
import json, runpy, sys
checkout, *command_lines = json.loads(sys.argv[1])
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "safetensors", "datasets", "huggingface_hub"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, checkout)
for words in command_lines:
    sys.argv = [checkout + "/pretrain_gpt.py", *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ValueError as error:
        print(json.dumps(str(error)))
ours = {name for name in sys.modules if name.startswith("megatron_dft")}
allowed = {"megatron_dft", "megatron_dft.stock"}
print(json.dumps(sorted(n for n in ours - allowed if not n.startswith("megatron_dft.losses"))))
print(json.dumps(sorted(n for n in sys.modules if n.startswith("megatron."))))
"""


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


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_diff_holds_our_three_lines_and_nothing_else(path):
    found = patch_command.read_patch(path)
    entry = "parse_and_validate_args" if found.core >= "0.18" else "pretrain"
    assert [text.decode() for _, text in found.additions] == [
        "from megatron_dft.stock import weighted_loss, with_loss_flags\n",
        "@weighted_loss\n",
        f"    {entry} = with_loss_flags({entry})\n",
    ]
    head = path.read_text().splitlines()
    assert head[0].startswith(f"Release: {path.stem} (checked at ")
    assert len(head) == 7 + 2 * 3 and all(line.endswith(" @@") for line in head[7::2])


def test_every_release_has_its_diff():
    found = {path.stem: patch_command.read_patch(path) for path in SHIPPED}
    assert {name: patch.core for name, patch in found.items()} == {
        "core_v0.16.1": "0.16",
        "core_v0.17.1": "0.17",
        "core_v0.18.2": "0.18",
        "core_r0.19.0": "0.19",
        "main": "0.20",
    }
    hashes = [digest for patch in found.values() for digest in (patch.before, patch.after)]
    assert len(set(hashes)) == 10
