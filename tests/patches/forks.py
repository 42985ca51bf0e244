"""Scripts and forks that the patch command is tried on."""

from pathlib import Path

from megatron_dft import cli
from tests.patches.stand_in import patched

ROOT = Path(__file__).parents[2]


SHIPPED = sorted((ROOT / "patches").glob("*.diff"))


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


# Edits of forks that leave the three places what they are.
FORKS = {
    "flags elsewhere": lambda text: text.replace("type=int, default=0", "default=0"),
    "no newline at the end": lambda text: text.rstrip("\n"),
    "of Windows": lambda text: text.replace("\n", "\r\n"),
    "lines around": lambda text: text.replace(
        "import json\n", "import json\nimport math\n"
    ).replace("args = None\n", "args = None\nscale = math.pi\n\n\ndef helper():\n    return 1\n\n"),
    "a function in the function": lambda text: text.replace(
        "    tokens = loss", "    def inner():\n        return None\n\n    tokens = loss"
    ),
    "a comment on the call": lambda text: text.replace(
        "    args = parse_and", "    # ours\n    args = parse_and"
    ),
    "two statements in a line": lambda text: text.replace(
        "    has_flag = True\n    args", "    has_flag = True; args"
    ),
    "another encoding": lambda text: text.replace(
        '"""A stand-in', "# -*- coding: latin-1 -*-\n# größer\n" + '"""A stand-in', 1
    ),
    "a function main": lambda text: (
        text.replace('if __name__ == "__main__":', "def main():")
        + '\n\nif __name__ == "__main__":\n    main()\n'
    ),
}


def written(fork, text):
    return fork(text).encode("latin-1" if "latin-1" in fork(text) else "utf-8")


def replaced(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new)

    return change


HEAD = "loss_mask, output_tensor, model=None\n"


RETURN = "    return loss, tokens, {"


CHANGED_PLACES = {
    "another order": (replaced(HEAD, "output_tensor, loss_mask, model=None\n"), "output_tensor, l"),
    "no model": (replaced(HEAD, "loss_mask, output_tensor\n"), "model=None"),
    "one more parameter": (replaced(HEAD, "loss_mask, output_tensor, model=None, k=1\n"), "k=1"),
    "model is required": (replaced(HEAD, "loss_mask, output_tensor, model\n"), "model=None"),
    "two results": (replaced(RETURN, "    return loss, {"), "(loss, tokens, report)"),
    "an early result": (
        replaced("    tokens = loss", "    if args:\n        return loss\n    tokens = loss"),
        "got `loss` in line",
    ),
    "another report": (replaced('"lm loss"', '"loss"'), "no such entry"),
    "a tuple in the report": (
        replaced("torch.stack([loss.detach().clone(), tokens.float()])", "(loss, tokens)"),
        "a tuple, as Megatron",
    ),
    "a decorator": (replaced("def loss_func(", "@torch.compile\ndef loss_func("), "a decorated"),
    "defined again": (
        replaced("def add_flag", "def loss_func():\n    pass\n\n\ndef add_flag"),
        "2",
    ),
    "bound again": (replaced("    has_flag = True", "    loss_func = print"), "another binding"),
    "imported": (
        lambda text: text.replace("def loss_func(", "def other(").replace(
            "import torch\n", "import torch\nfrom losses import loss_func\n"
        ),
        "got none",
    ),
    "no call": (replaced("    args = parse_and_validate_args(", "    args = dict("), "none"),
    "called twice": (replaced("    has_flag = True", "    parse_and_validate_args()"), "2 calls"),
    "not imported": (
        replaced("from megatron.training import parse_and_validate_args\n", ""),
        "another",
    ),
    "no Python": (replaced("args = None", "args = = None"), "invalid syntax"),
    "our decorator gone": (lambda text: patched(text).replace("@weighted_loss\n", ""), "a changed"),
    "a line of ours only": (lambda text: "import megatron_dft\n" + text, "a changed patch"),
}


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


# The unedited script, the patched one (stock_run, then as it is), and one that fails.
UNEDITED = """
import runpy, sys, traceback
from megatron_dft import stock_run
scripts = sys.argv[1:]
for run in (stock_run.main, stock_run.main, None, stock_run.main):
    words = [scripts.pop(0), "--loss", "dft"]
    try:
        if run:
            assert run(words) == 0 and sys.argv == words
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except ZeroDivisionError:
        traceback.print_exc(file=sys.stdout)
"""
