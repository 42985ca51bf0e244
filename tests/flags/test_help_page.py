"""--help is short and ours, --help-megatron the rest, and what they say of Megatron is so."""

import argparse
import contextlib
import importlib
import io
import re
import subprocess
import sys

import pytest

from megatron_dft.flags import help_page
from megatron_dft.flags.defaults import TRAINING_DEFAULTS
from tests.ranks import run_ranks


def _help(module, word):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            return importlib.import_module(module).main([word]), text.getvalue()
        except SystemExit as exit:
            return exit.code, text.getvalue()


@pytest.mark.parametrize("module", ["megatron_dft.train", "megatron_dft.score"])
def test_help_prints_megatrons_flags_and_ours(module):
    ((status, text),) = run_ranks(_help, 1, module, "--help", init=False)
    assert status == 0
    words = text.split()
    for flag in ("--tensor-model-parallel-size", "--hf-model", "--train-data", "--dft-mix-alpha"):
        assert flag in words, flag
    assert "2508.05629" in text and "default: dft" in text
    assert "--moe-router-topk" not in words and len(text.splitlines()) < 400


def test_the_other_flags_of_megatron_have_a_page_of_their_own():
    ((status, text),) = run_ranks(_help, 1, "megatron_dft.train", "--help-megatron", init=False)
    assert status == 0
    words = text.split()
    assert "--moe-router-topk" in words and "--adam-beta2" in words
    assert "--hf-model" not in words and "--dft-mix-alpha" not in words


def _megatron_defaults():
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    parser.set_defaults(**TRAINING_DEFAULTS)
    return {name: a.default for a in parser._actions for name in a.option_strings}


def test_what_help_says_of_megatrons_flags_is_true():
    (found,) = run_ranks(_megatron_defaults, 1, init=False)
    for flag, _, text in help_page._COMMON:
        assert flag in found, flag
        told = re.search(r"default: (\S+)$", text)
        if told and flag != "--bf16":
            assert str(found[flag]).removesuffix(".0") == told[1].removesuffix(".0"), flag


def test_our_help_needs_neither_torch_nor_megatron():
    program = "import sys; from megatron_dft.cli import main; main(['train', '--help']); "
    program += "sys.exit(' '.join({'torch', 'megatron', 'rich'} & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and "--dft-mix-alpha" in run.stdout, run.stderr
