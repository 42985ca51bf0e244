"""The documentation is built without a warning, and says of flags what the flags say."""

import subprocess
import sys
from pathlib import Path

from tools import flags_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_flags_page_is_that_of_the_flags():
    assert flags_page.PAGE.read_text() == flags_page.page(), "run python tools/flags_page.py"
    assert flags_page.TABLE.read_text() == flags_page.table(), "run python tools/flags_page.py"


def test_mkdocs_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "flags" / "index.html").is_file()
    loops = (tmp_path / "loops" / "index.html").read_text()
    assert loops.count("manual_seed") >= 2, "the files are included"


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
