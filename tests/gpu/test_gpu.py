"""The GPU suite's sections under pytest; skipped, with the reason, where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: bash tests/gpu/run.sh needs one")
@pytest.mark.parametrize("section", ["start", "parity", "heads", "train"])
def test_section(section, tmp_path):
    words = ["bash", "tests/gpu/run.sh", "--out", str(tmp_path), section]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
