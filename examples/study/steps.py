"""Steps of the study: commands of the product, each run once and kept when it is whole."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dft.compat.loopback import free_port

# (module, its arguments, log file) → runs to the end, or raises StepFailed.
Runner = Callable[[str, Sequence[str], Path], None]


class StepFailed(RuntimeError):
    """A command of the study failed; the message ends with its log's last lines."""


def run_process(module: str, argv: Sequence[str], log: Path) -> None:
    """`python -m module argv…` in a process of its own, all it prints in `log`.

    module: its name, or a program's file.
    """
    program = [module] if module.endswith(".py") else ["-m", module]
    # One training process brings up gloo too; two studies on a machine must not share its port.
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # Keeping freed buffers makes a training step on CPU faster (see examples/quickstart.sh).
    env.setdefault("MALLOC_MMAP_THRESHOLD_", "4294967296")
    env.setdefault("MALLOC_TRIM_THRESHOLD_", "8589934592")
    with log.open("wb") as out:
        code = subprocess.run(
            [sys.executable, *program, *argv], stdout=out, stderr=out, env=env
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise StepFailed(f"{module} ended with status {code}; the end of {log}:\n{tail}")


def fingerprint(path: Path) -> str:
    """Of a file, or of the weights in a directory."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Steps:
    """Runs steps under one directory; a step with unchanged command and inputs is not redone."""

    def __init__(self, out: Path, run: Runner, say: Callable[[str], None]) -> None:
        self.out, self.run, self.say = out, run, say
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def __call__(
        self, name: str, module: str, argv: Sequence[object], inputs: Sequence[Path], output: Path
    ) -> None:
        """Run the command unless it has been; inputs are what it reads, output the file or
        directory that it writes.

        Raises StepFailed.
        """
        words = [str(word) for word in argv]
        key = json.dumps([module, words, [fingerprint(path) for path in inputs]])
        log = self.out / "logs" / f"{name}.log"
        done = log.with_suffix(".done")
        if done.exists() and done.read_text(encoding="utf-8") == key and output.exists():
            self.say(f"{name}: kept")
            return
        done.unlink(missing_ok=True)
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        start = time.monotonic()
        self.run(module, words, log)
        seconds = time.monotonic() - start
        log.with_suffix(".seconds").write_text(f"{seconds:.1f}\n", encoding="utf-8")
        # Last of all: an interrupted step has no such file.
        done.write_text(key, encoding="utf-8")
        self.say(f"{name}: {seconds:.0f} s")

    def seconds(self, name: str) -> float:
        """How long a step that is done took, its process's start included."""
        return float((self.out / "logs" / f"{name}.seconds").read_text(encoding="utf-8"))
