"""The shipped diffs on the real scripts of each release, and three training steps of 0.19's.

Run where MEGATRON_LM_DIRS names checkouts or a mirror of Megatron-LM lies beside this repository.
"""

import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dft import cli
from megatron_dft.commands import patch as patch_command
from megatron_dft.compat import stock_script
from megatron_dft.compat.stock_places import PlaceError
from tests.patches.checkouts import MIRROR, copy_scripts, sources
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not sources(), reason="no real tree here: set MEGATRON_LM_DIRS to Megatron-LM checkouts"
)


@pytest.mark.parametrize("name", sources())
def test_the_diff_of_a_real_release(name, tmp_path, capsys):
    tree = copy_scripts(name, tmp_path / "tree")
    script = tree / "pretrain_gpt.py"

    def patch(*flags):
        assert cli.main(["patch", "--megatron-lm", str(tree), *flags]) == 0
        return capsys.readouterr().out

    patch("--revert")  # a checkout from MEGATRON_LM_DIRS may be patched already
    original = script.read_bytes()
    assert "would apply" in patch("--check")
    assert "applied" in patch()
    patched = script.read_bytes()
    py_compile.compile(str(script), cfile=str(tmp_path / "out.pyc"), doraise=True)
    (diff,) = {found.path for found in patch_command.read_all_known()
               if found.after == patch_command.blob_hash(patched)}  # fmt: skip

    # What git makes of the same diff, forwards and back.
    other = tmp_path / "git"
    other.mkdir()
    shutil.copy(script, other)
    git = ["git", "apply", "--unidiff-zero"]
    subprocess.run([*git, "-R", str(diff)], cwd=other, check=True)
    assert (other / "pretrain_gpt.py").read_bytes() == original
    subprocess.run([*git, str(diff)], cwd=other, check=True)
    assert (other / "pretrain_gpt.py").read_bytes() == patched

    # One definition is decorated, one import and one call are added, all where they take effect.
    lines = patched.decode().splitlines()
    assert lines[lines.index("@weighted_loss") + 1] == "def loss_func("
    entry = next(line for line in lines if "with_loss_flags(" in line).split(" = ")[0].strip()
    use = next(i for i, line in enumerate(lines) if "with_loss_flags(" in line) + 1
    assert lines[use].strip() in (f"{entry}(", f"args = {entry}(")
    assert patch("--revert") and script.read_bytes() == original


# Commits of main between the releases, whose scripts no diff knows; one that returns otherwise.
OLDER = ("75c07217d1", "c40b6ea070", "97aca2f887", "b60de39e29", "e97ac83603")
REPORTS_A_TUPLE = "bbe933713d"


def _script_of(commit):
    command = ["git", "-C", str(MIRROR), "show", f"{commit}:pretrain_gpt.py"]
    shown = subprocess.run(command, capture_output=True)
    if shown.returncode:
        pytest.skip(f"no mirror with the commit {commit}")
    return shown.stdout


@pytest.mark.parametrize("commit", OLDER)
def test_an_older_commit_of_main(commit):
    script = _script_of(commit)
    known = patch_command.read_all_known()
    patched, release = patch_command.patched(script, known)
    assert release is None and patch_command.blob_hash(script) not in {k.before for k in known}
    assert stock_script.revert(patched) == script
    assert patched.count(b"megatron_dft") == 1 and patched.count(b"@weighted_loss\ndef loss") == 1
    assert stock_script.compiled(script, "pretrain_gpt.py")


def test_a_commit_with_another_contract_is_refused():
    with pytest.raises(PlaceError, match="loss_func_modelopt"):
        stock_script.apply(_script_of(REPORTS_A_TUPLE))


FLAGS = """
--distributed-backend gloo --transformer-impl local --use-cpu-initialization
--no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --num-layers 1 --hidden-size 16
--num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2
--global-batch-size 4 --train-iters 3 --lr 3e-2 --min-lr 3e-2 --lr-decay-style constant
--clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer --vocab-size 15
--make-vocab-size-divisible-by 8 --eval-iters 0 --eval-interval 9 --log-interval 1
--split 98,1,1 --num-workers 0 --no-create-attention-mask-in-dataloader --attention-dropout 0
--hidden-dropout 0 --seed 3
""".split()


def _formula(loss_mask: Any, output_tensor: Any, model: Any = None) -> tuple[Any, Any, Any]:
    """DFT as its paper writes it, in place of the script's own loss function."""
    import torch

    mask = loss_mask.view(-1).float()
    ce = output_tensor.view(-1).float()
    each = torch.exp(-ce).detach() * ce * mask
    count = mask.sum()
    report = {
        "lm loss": torch.stack([(ce * mask).sum().detach(), count]),
        "dft loss": torch.stack([each.sum().detach(), count]),
    }
    return each.sum(), count.to(torch.int), report


def _train(tree: str, words: list[str], formula: bool, unedited: bool) -> list[dict[str, float]]:
    """The figures of each step of that tree's pretrain_gpt.py on the CPU runtime."""
    from megatron_dft.compat.loop import on_training_log
    from megatron_dft.compat.release import skip_built_helpers
    from megatron_dft.cpu import runtime

    heard: list[dict[str, float]] = []

    def hear(losses: dict[str, Any], call: dict[str, Any]) -> None:
        figures = {name: float(value) for name, value in losses.items()}
        heard.append({**figures, "grad_norm": float(call["grad_norm"])})

    runtime.activate()
    skip_built_helpers()
    on_training_log(hear)
    script = Path(tree, "pretrain_gpt.py")
    sys.path.insert(0, tree)
    if unedited:
        from megatron_dft import stock_run

        assert stock_run.main([str(script), *FLAGS, *words]) == 0
        return heard
    sys.argv = [str(script), *FLAGS, *words]
    head, guard, main = script.read_text().partition('if __name__ == "__main__":')
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    exec(compile(head, str(script), "exec"), scope)
    if formula:
        scope["loss_func"] = _formula
    exec(compile(guard + main, str(script), "exec"), scope)
    return heard


NEWEST_WITH_A_WHEEL = [one for one in sources() if "0.19" in one]


def _train_here(
    tree: Path, *words: str, formula: bool = False, unedited: bool = False
) -> list[dict[str, float]]:
    figures = run_ranks(_train, 1, str(tree), list(words), formula, unedited, init=False)[0]
    assert len(figures) == 3
    return figures


def _patch(tree: Path, *flags: str) -> None:
    assert cli.main(["patch", "--megatron-lm", str(tree), *flags]) == 0


@pytest.mark.parametrize("name", NEWEST_WITH_A_WHEEL)
def test_three_steps_of_the_patched_script_equal_the_formula(name, tmp_path):
    tree = copy_scripts(name, tmp_path)
    _patch(tree, "--revert")
    formula = _train_here(tree, formula=True)
    unedited = _train_here(tree, "--loss", "dft", unedited=True)
    _patch(tree)
    patched = _train_here(tree, "--loss", "dft")
    assert unedited == patched  # bit for bit
    for ours, expected in zip(patched, formula, strict=True):
        for key in ("lm loss", "dft loss", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWEST_WITH_A_WHEEL)
def test_without_the_flag_the_patched_script_is_the_stock_one(name, tmp_path):
    tree = copy_scripts(name, tmp_path)
    _patch(tree, "--revert")
    stock = _train_here(tree)
    _patch(tree)
    assert _train_here(tree) == stock  # bit for bit
    dft = _train_here(tree, "--loss", "dft")
    # The same model at first, another one afterwards.
    assert dft[0]["lm loss"] == stock[0]["lm loss"]
    assert dft[0]["grad_norm"] < 0.5 * stock[0]["grad_norm"]
    assert abs(dft[2]["lm loss"] / stock[2]["lm loss"] - 1) > 1e-3
