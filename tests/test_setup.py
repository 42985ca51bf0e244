"""The set-up of a bare checkout: which Python it takes, what it says without one, what it keeps."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Stands in for a Python: answers the version probe, makes "environments", logs what pip is asked.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *version_info*) exit {usable} ;;
    --version) echo "Python {version}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$0" > "$3/made-by" ;;
    "-m pip "*) echo "$*" >> "{log}"
        echo "WARNING: Location 'file:///nowhere' is ignored: it is neither a file nor a directory."
        echo "Collecting torch"
        echo "Downloading torch-2.whl (800 MB)"
        echo "Installing collected packages: torch, numpy"
        {pip} ;;
    *) exit 9 ;;
esac
"""


class Checkout:
    """A bare checkout with the set-up script, and a PATH with only what the test puts there."""

    def __init__(self, directory: Path) -> None:
        self.root, self.bin, self.log = directory / "co", directory / "bin", directory / "pip.log"
        (self.root / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("tools/setup_env.sh", "setup.py"):
            (self.root / name).write_bytes((ROOT / name).read_bytes())
        tools = "bash cat cp cut date dirname flock mkdir rm sed sha256sum"
        for tool in tools.split():
            path = next(p for p in (Path("/usr/bin"), Path("/bin")) if (p / tool).exists()) / tool
            (self.bin / tool).symlink_to(path)

    def add_python(self, name, version, usable=True, pip="exit 0", where=None):
        path = (where or self.bin) / name
        path.write_text(
            FAKE_PYTHON.format(version=version, usable=0 if usable else 1, pip=pip, log=self.log)
        )
        path.chmod(0o755)

    def run(self, *extras, cwd="/", **env):
        command = f'set -euo pipefail; . "{self.root}/tools/setup_env.sh"; setup_env "$@"'
        home = {"PATH": str(self.bin), "HOME": str(self.root.parent)}
        return subprocess.run(
            [str(self.bin / "bash"), "-c", command, "set-up", *extras],
            env=home | env,
            cwd=cwd,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def pip_calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_without_python_it_says_how_to_get_one(checkout):
    checkout.add_python("python3", "3.11.2", usable=False)
    result = checkout.run("test")
    assert result.returncode == 1
    assert "no Python 3.12 or newer" in result.stderr
    assert "pyenv install 3.12" in result.stderr and "apt-get install python3.12" in result.stderr
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("chosen", ["python3.12", "python3"])
def test_the_first_usable_python_makes_the_environment(checkout, chosen):
    checkout.add_python("python3", "3.12.9", usable=chosen == "python3")
    checkout.add_python("python3.12", "3.12.1", usable=chosen == "python3.12")
    result = checkout.run("test")
    assert result.returncode == 0, result.stderr
    made_by = (checkout.root / ".venv/made-by").read_text().strip()
    assert Path(made_by).name == chosen


def test_pyenv_serves_where_its_shims_are_not_on_the_path(checkout):
    directory = checkout.root.parent / ".pyenv/versions/3.12.1/bin"
    directory.mkdir(parents=True)
    checkout.add_python("python3", "3.12.1", where=directory)
    assert checkout.run("test").returncode == 0
    assert str(directory) in (checkout.root / ".venv/made-by").read_text()


def test_a_named_python_that_will_not_do_is_refused(checkout):
    checkout.add_python("python3.12", "3.12.1")
    checkout.add_python("old", "3.9.0", usable=False)
    result = checkout.run("test", PYTHON=str(checkout.bin / "old"))
    assert result.returncode == 1 and "expected Python 3.12 or newer" in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_a_finished_set_up_is_kept_and_each_extra_installed_once(checkout):
    checkout.add_python("python3.12", "3.12.1")
    for extras in (["test"], ["test"], ["quickstart"], ["test", "quickstart"]):
        assert checkout.run(*extras).returncode == 0
    calls = checkout.pip_calls()
    assert len(calls) == 2
    assert calls[0].endswith(f"-e {checkout.root}[test]")
    assert calls[1].endswith(f"-e {checkout.root}[quickstart]")


def test_a_changed_setup_py_or_a_moved_checkout_installs_again(checkout):
    checkout.add_python("python3.12", "3.12.1")
    assert checkout.run("test").returncode == 0
    (checkout.root / "setup.py").write_text("# another\n")
    assert checkout.run("test").returncode == 0
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.run("test").returncode == 0
    assert len(checkout.pip_calls()) == 3


@pytest.mark.parametrize("pip", ["echo 'ERROR: no space left'; exit 1", "kill -9 $PPID"])
def test_an_install_that_failed_or_was_cut_off_is_taken_up_again(checkout, pip):
    checkout.add_python("python3.12", "3.12.1", pip=pip)
    result = checkout.run("test")
    assert result.returncode != 0
    if "ERROR" in pip:
        assert "ERROR: no space left" in result.stdout and "pip failed" in result.stderr
    # The environment was made and stays; its stamp was not written.
    checkout.add_python("python", "3.12.1", where=checkout.root / ".venv/bin")
    assert checkout.run("test").returncode == 0
    assert len(checkout.pip_calls()) == 2


def test_a_broken_environment_is_made_anew(checkout):
    checkout.add_python("python3.12", "3.12.1")
    assert checkout.run("test").returncode == 0
    checkout.add_python("python", "3.12.1", usable=False, where=checkout.root / ".venv/bin")
    assert checkout.run("test").returncode == 0
    assert len(checkout.pip_calls()) == 2


def test_progress_is_shown_and_noise_is_not(checkout):
    checkout.add_python("python3.12", "3.12.1")
    out = checkout.run("test").stdout
    assert "installing megatron-dft[test]" in out and "Downloading torch-2.whl (800 MB)" in out
    assert "Installing collected packages" in out and "numpy" not in out
    assert "WARNING" not in out and "Collecting" not in out


def test_it_works_from_any_directory_and_by_a_relative_path(checkout):
    checkout.add_python("python3.12", "3.12.1")
    command = f'cd "{checkout.root}/tools" && . ./setup_env.sh && echo "$root"'
    result = subprocess.run(
        [str(checkout.bin / "bash"), "-c", command],
        env={"PATH": str(checkout.bin), "HOME": "/"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == str(checkout.root)


def test_the_scripts_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "tests/run.sh" in (ROOT / ".ci/run").read_text()
