"""The wheel of the files that docker/Dockerfile copies, in an empty environment, from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dft import __version__
from megatron_dft.cli import COMMANDS

ROOT = Path(__file__).parents[1]


def copied_by_docker() -> list[str]:
    """What the image gets of the checkout."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_the_image_copies_what_is_there():
    names = copied_by_docker()
    assert {"setup.py", "megatron_dft", "patches", "README.md"} <= set(names)
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_in_an_empty_environment(tmp_path):
    """Needs a package index, some minutes and 6 GB."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in copied_by_docker():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words, cwd=tmp_path):
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run(sys.executable, "-m", "venv", venv)
    pip = (venv / "bin" / "python", "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", source)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"megatron_dft-{__version__}-")
    run(*pip, "install", wheel)
    shutil.rmtree(source)
    command = venv / "bin" / "megatron-dft"
    assert run(command, "--version").strip() == __version__
    assert all(name in run(command, "--help") for name in COMMANDS)
    for name in COMMANDS:
        run(command, name, "--help")
    # What is not Python: the patches, and above the table of --help. What is imported late: the
    # trainer and its CPU runtime.
    assert (venv / "share" / "megatron_dft" / "patches" / "core_r0.19.0.diff").is_file()
    python = venv / "bin" / "python"
    assert "--dft-mix-alpha" in run(python, "-m", "megatron_dft.train", "--device", "cpu", "--help")
