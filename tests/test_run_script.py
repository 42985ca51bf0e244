"""tests/run.sh is green only where every check is, and ends with pytest's own line."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *version_info*) exit 0 ;;
    --version) echo "Python 3.12.1" ;;
    "-m pip "*) ;;
    *doctest-modules*) [ ! -e red-doctests ] ;;
    "-m pytest"*) echo "threads $OMP_NUM_THREADS, arguments $*"
        if [ -e red-tests ]; then echo "1 failed, 2 passed in 0.1s"; exit 1; fi
        echo "3 passed in 0.1s" ;;
    *) exit 9 ;;
esac
"""
CHECKS = {"ruff": "ruff check", "mypy": "mypy", "lint-imports": "lint-imports"}


@pytest.fixture
def run(tmp_path):
    """Runs tests/run.sh in a checkout of stand-ins where the checks of these names fail."""
    for name in ("setup.py", "tools/setup_env.sh", "tests/run.sh", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(FAKE_PYTHON)
    for name in (*CHECKS, "shellcheck"):
        (programs / name).write_text(f"#!/bin/bash\n[ ! -e red-{name} ]\n")
    for path in programs.iterdir():
        path.chmod(0o755)

    def run_script(*arguments, red=(), script="tests/run.sh"):
        for name in red:
            (tmp_path / f"red-{name}").touch()
        command = ["bash", str(tmp_path / script), *arguments]
        return subprocess.run(
            command, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    return run_script


@pytest.mark.parametrize("script", ["tests/run.sh", ".ci/run"])
def test_green_ends_with_the_line_of_pytest_and_passes_arguments_on(run, script):
    result = run("tests/losses", "-k", "a b", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "3 passed in 0.1s"
    assert "threads 1, arguments -m pytest tests/losses -k a b" in result.stdout
    assert "RED" not in result.stdout


@pytest.mark.parametrize("check", [*CHECKS, "doctests"])
def test_one_red_check_fails_the_run_but_the_tests_still_run(run, check):
    result = run(red=[check])
    assert result.returncode == 1
    assert f"RED so far: {CHECKS.get(check, check)}" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 passed in 0.1s"


def test_red_tests_fail_the_run(run):
    result = run(red=["tests"])
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 failed, 2 passed in 0.1s"
