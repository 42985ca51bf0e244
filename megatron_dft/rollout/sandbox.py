"""Runs a command on one sample: alone, without network, with limits, in a folder that is removed.

It keeps accidents away, not an attacker: the files of the user who runs it can be read and written.
Where that matters, run `verify` in a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from megatron_dft.rollout.verdict import Task, Verdict

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# The first process of a namespace ignores most signals and would pass off a crash as success: a
# shell takes that place, and tells of a signal by 128 + its number.
_FIRST_PROCESS = ("sh", "-c", '"$@"; exit $?', "sh")
_FILE_BYTES = 256 << 20
_PROCESSES = 128
# Limits are set by a small program in between: after a fork, a process with threads may not run
# Python before exec.
_LIMITS = """
import os, resource, sys
seconds, memory, size, processes, *command = sys.argv[1:]
for name, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory),
                    (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0),
                    (resource.RLIMIT_NPROC, processes)):
    if int(value) >= 0:
        resource.setrlimit(name, (int(value), int(value)))
os.execvp(command[0], command)
"""


@cache
def isolates() -> bool:
    """Whether this machine lets a user start a process without network, in namespaces."""
    try:
        done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class SandboxedCommand:
    """`command` runs in a fresh folder with response.txt, code.txt (the last fenced block of the
    response, or all of it) and answer.txt; exit status 0 is reward 1, any other 0.
    """

    def __init__(self, command: str, seconds: float, memory_mib: int) -> None:
        self._seconds, self._memory = seconds, memory_mib << 20
        self._words = _words(command)

    def verify(self, task: Task) -> Verdict:
        with tempfile.TemporaryDirectory(
            prefix="megatron-dft-verify-", ignore_cleanup_errors=True
        ) as folder:
            for name, text in _files(task).items():
                Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
            return self._run(folder)

    def _run(self, folder: str) -> Verdict:
        inside = isolates()
        limits = [int(self._seconds) + 1, self._memory, _FILE_BYTES, _PROCESSES if inside else -1]
        command = [sys.executable, "-I", "-S", "-c", _LIMITS, *map(str, limits)]
        process = subprocess.Popen(
            [*command, *((*_NAMESPACES, *_FIRST_PROCESS) if inside else ()), *self._words],
            cwd=folder,
            # The user's tokens are none of a model's business.
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            return Verdict(0.0, kind=f"command that took longer than {self._seconds:g} s")
        finally:
            _kill_group(process.pid)  # and what it left in the background
            process.wait()
        return _verdict(status)


def _verdict(status: int) -> Verdict:
    if status in (126, 127):  # the shell's and unshare's words for it
        return Verdict(None, kind=f"command that could not be started ({status})")
    if status < 0 or status > 128:
        number = -status if status < 0 else status - 128
        return Verdict(0.0, kind=f"command that was ended by signal {number}")
    return Verdict(float(status == 0))


def _files(task: Task) -> dict[str, str]:
    blocks = _FENCE.findall(task.text)
    answer = task.answer if isinstance(task.answer, str) else json.dumps(task.answer)
    code = blocks[-1] if blocks else task.text
    return {"response.txt": task.text, "code.txt": code, "answer.txt": answer}


def _words(command: str) -> list[str]:
    """The command's words; files of this folder by their whole path, as it runs elsewhere."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--command {command!r}: {error}") from None
    words = [str(Path(w).resolve()) if Path(w).is_file() else w for w in words]
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"--command {command!r}: expected a program that can be run, for example "
            "'python3 check.py'"
        )
    return words


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
