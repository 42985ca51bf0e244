"""A checkout for the tests: a training script of our own with the lines that the diffs hold on to.

It prints, as JSON, the loss, the gradient and the report of one batch of per-token cross entropies.
"""

import re
import subprocess
from pathlib import Path

SCRIPT = '''\
"""A stand-in for pretrain_gpt.py."""
import json

import torch
from megatron.training import parse_and_validate_args
from model_provider import model_provider

args = None


def loss_func(
    loss_mask, output_tensor, model=None
):
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask.view(-1).float())
    tokens = loss_mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach().clone(), tokens.float()])}


def add_flag(parser):
    parser.add_argument("--of-the-script", type=int, default=0)
    return parser


if __name__ == "__main__":
    has_flag = True
    args = parse_and_validate_args(
        extra_args_provider=add_flag if has_flag else None,
    )
    model_provider.args = args
    cross_entropy = torch.tensor([[0.1, 0.7, 2.3], [5.0, 0.02, 9.0]], requires_grad=True)
    loss, tokens, report = loss_func(
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), cross_entropy, model=torch.nn.Module()
    )
    loss.backward()
    report = {name: entry.tolist() for name, entry in report.items()}
    print(json.dumps([float(loss), int(tokens), cross_entropy.grad.tolist(), report, vars(args)]))
'''

# In place of Megatron: what the script and megatron_dft.stock take from it.
ARGUMENTS = """\
import argparse

from model_provider import model_provider


def get_args():
    return model_provider.args


def parse_and_validate_args(extra_args_provider=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--fp16-lm-cross-entropy", action="store_true")
    parser = extra_args_provider(parser) if extra_args_provider else parser
    return parser.parse_args()
"""

ADDED = {
    "from model_provider import model_provider\n": (
        "",
        "from megatron_dft.stock import weighted_loss, with_loss_flags\n",
    ),
    "def loss_func(\n": ("@weighted_loss\n", ""),
    "    args = parse_and_validate_args(\n": (
        "    parse_and_validate_args = with_loss_flags(parse_and_validate_args)\n",
        "",
    ),
}


def patched(script: str) -> str:
    """The script with our three lines in it."""
    for line, (before, after) in ADDED.items():
        assert script.count(f"\n{line}") == 1
        script = script.replace(f"\n{line}", f"\n{before}{line}{after}")
    return script


def write_checkout(directory: Path, version: tuple[int, int] = (0, 19)) -> Path:
    """A directory that looks like a Megatron-LM checkout of that release."""
    (directory / "megatron" / "core").mkdir(parents=True)
    (directory / "megatron" / "training").mkdir()
    (directory / "megatron" / "training" / "__init__.py").write_text(ARGUMENTS)
    (directory / "megatron" / "core" / "package_info.py").write_text(
        f"MAJOR = {version[0]}\nMINOR = {version[1]}\nPATCH = 1\n"
    )
    (directory / "model_provider.py").write_text("class model_provider:\n    args = None\n")
    (directory / "pretrain_gpt.py").write_text(SCRIPT)
    return directory


def write_diff(path: Path, before: str, after: str, core: str = "0.19") -> Path:
    """The diff between two scripts as git writes it, with a head like those of patches/."""
    work = path.parent / "work"
    for side, text in (("a", before), ("b", after)):
        (work / side).mkdir(parents=True, exist_ok=True)
        (work / side / "pretrain_gpt.py").write_text(text)
    command = ["git", "diff", "--no-index", "-U0", "--full-index", "--no-prefix", "--no-color"]
    diff = subprocess.run(
        [*command, "a/pretrain_gpt.py", "b/pretrain_gpt.py"],
        cwd=work,
        capture_output=True,
        text=True,
    ).stdout
    # After the second @@ git quotes a line of the script.
    diff = re.sub(r"^(@@ .*? @@).*$", r"\1", diff, flags=re.MULTILINE)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"Release: stand-in\nMegatron-Core: {core}\n\n{diff}")
    return path
