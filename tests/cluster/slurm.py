"""A virtual Slurm cluster and jobs of the real finetune.sbatch on it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAB = ROOT / "tests" / "cluster" / "lab.sh"
SCRIPT = ROOT / "examples" / "slurm" / "finetune.sbatch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_PERIOD = 0.5  # seconds between two looks


def _poll(job: "Job", condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition()` is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        assert not job.cluster.closed, "the tests are over"
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}\n{job.text()[-6000:]}")
        time.sleep(_PERIOD)


class Cluster:
    """Nodes n1 … nN; commands run with its SLURM_CONF."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory, self.nodes = directory, nodes
        self.closed = False  # nobody waits for the jobs any more
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
        } | {"SLURM_CONF": str(directory / "slurm.conf")}

    def lab(self, verb: str, *words: str) -> None:
        subprocess.run(["bash", LAB, verb, self.directory, *words], check=True)

    def run(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, cwd=ROOT, env=self.env | env, check=check, capture_output=True, text=True
        )

    def names(self, nodes: str) -> list[str]:
        """n[1-2] → n1, n2."""
        return self.run("scontrol", "show", "hostnames", nodes).stdout.split()

    def submit(self, config: Path, run_dir: Path, nodes: int, *flags: str, options=()) -> "Job":
        log = run_dir.with_suffix(".log")
        words = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", *options]
        done = self.run(*words, str(SCRIPT), str(config), *flags, RUN_DIR=str(run_dir))
        return Job(self, done.stdout.strip(), run_dir, log)


class Job:
    """A submitted job: what Slurm says of it, and what it wrote."""

    def __init__(self, cluster: Cluster, number: str, run_dir: Path, log: Path) -> None:
        self.cluster, self.number, self.run_dir, self.log = cluster, number, run_dir, log

    def show(self, field: str) -> str:
        text = self.cluster.run("scontrol", "-o", "show", "job", self.number).stdout
        found = re.search(rf"(?:^|\s){field}=(\S*)", text)
        assert found, text
        return found[1]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, pattern: str, seconds: float = 900) -> re.Match:
        """Wait for a line of the log; fails at once if the job has ended without it."""

        def look():
            found = re.search(pattern, self.text())
            if not found and self.show("JobState") in ENDED:
                found = re.search(pattern, self.text())
                assert found, f"the job ended without {pattern!r}:\n{self.text()[-6000:]}"
            return found

        return _poll(self, look, seconds, pattern)

    def ended(self, seconds: float = 900) -> tuple[str, str]:
        """Wait for the end: (state, exit code as Slurm writes it)."""

        def look():
            state = self.show("JobState")
            return state if state in ENDED else None

        state = _poll(self, look, seconds, "end of the job")
        return state, self.show("ExitCode")

    def signal_batch(self, name: str) -> None:
        """What Slurm itself does ahead of the time limit (--signal=B:…)."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def losses(self) -> dict[int, float]:
        """step → plain cross entropy, from the progress lines of all legs."""
        return {
            int(step): float(loss)
            for step, loss in re.findall(r"step (\d+)/\d+ \| lm loss ([\d.]+)", self.text())
        }

    def figures(self) -> list[dict[str, float]]:
        """The figures of each step in the order of training, from a job with the listener."""
        return [json.loads(found) for found in re.findall(r"FIGURES (\{.*?\}) \.", self.text())]

    def rows(self) -> dict[tuple[int, int], list[int]]:
        """(rank, step) → checksums of its rows; the last time, where a step was trained twice."""
        found: dict[tuple[int, int], list[int]] = {}
        for text in re.split(r"\[job\] leg \d+:", self.text()):
            of_leg: dict[tuple[int, int], list[int]] = {}
            for entry in re.findall(r"ROWS (\[.*?\]\]) \.", text):
                rank, step, rows = json.loads(entry)
                of_leg.setdefault((rank, step), []).extend(rows)
            found |= of_leg
        return found

    def resumed(self) -> list[int]:
        """The steps that its legs went on from."""
        return [int(step) for step in re.findall(r"going on from step (\d+)", self.text())]

    def ends(self) -> list[str]:
        """How each leg ended: the word of its run, which is its first in the [job] line."""
        return re.findall(r"\[job\] srun ended with \d+; the run says: (\w[\w-]*)", self.text())

    def checkpoints(self) -> list[int]:
        """Steps that have a directory."""
        found = (self.run_dir / "checkpoints").glob("iter_*")
        return sorted(int(path.name[5:]) for path in found)

    @property
    def success(self) -> bool:
        return (self.run_dir / "SUCCESS").exists()


def write_config(
    path: Path, flags: list[str], procs: int, faults: str, last: str, settings: dict[str, Any]
) -> Path:
    """A configuration for CPU ranks of the tests' own Python; `faults` as faulty.py takes them,
    `last` is its last line."""
    wrapper = path.with_suffix(".python")
    wrapper.write_text(
        f'#!/bin/bash\nexec {sys.executable} "${{@/#megatron_dft.train/tests.cluster.faulty}}"\n'
    )
    wrapper.chmod(0o755)
    cache = os.environ["MEGATRON_DFT_DATA_CACHE"]
    values = {"PROCS_PER_NODE": procs, "OMP_NUM_THREADS": 1, "PREFLIGHT": 0, "PYTHON": wrapper}
    lines = [
        *(f"{name}={shlex.quote(str(value))}" for name, value in (values | settings).items()),
        f"export TORCHDYNAMO_DISABLE=1 MEGATRON_DFT_DATA_CACHE={shlex.quote(cache)}",
        f"export FAULTS={shlex.quote(faults)}",
        f"TRAIN_ARGS=(--device cpu {shlex.join(flags)})",
        last,
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
