"""One version, in the package; what else states it says the same."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_dft import __version__

ROOT = Path(__file__).parents[1]


def test_the_package_s_version_is_everybody_s():
    command = [sys.executable, "setup.py", "--version"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == __version__
