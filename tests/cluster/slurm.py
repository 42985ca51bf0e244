"""A virtual Slurm cluster and jobs of the real finetune.sbatch on it."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAB = ROOT / "tests" / "cluster" / "lab.sh"
SCRIPT = ROOT / "examples" / "slurm" / "finetune.sbatch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def poll(condition: Callable[[], object], seconds: float, what: str, log: Path | None = None):
    """Wait until `condition()` is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-6000:] if log and log.exists() else ""
            raise AssertionError(f"not within {seconds:g} s: {what}\n{tail}")
        time.sleep(0.1)


class Cluster:
    """Nodes n1 … nN; commands run with its SLURM_CONF."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.directory, self.nodes = directory, nodes
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
        } | {"SLURM_CONF": str(directory / "slurm.conf")}

    def lab(self, verb: str, *words: str) -> None:
        subprocess.run(["bash", LAB, verb, self.directory, *words], check=True)

    def run(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, cwd=ROOT, env=self.env | env, check=check, capture_output=True, text=True
        )

    def submit(self, config: Path, run_dir: Path, nodes: int, *flags: str, options=()) -> "Job":
        log = run_dir.with_suffix(".log")
        words = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", *options]
        done = self.run(*words, str(SCRIPT), str(config), *flags, RUN_DIR=str(run_dir))
        return Job(self, done.stdout.strip(), run_dir, log)

    def rest(self) -> None:
        """Wait until all nodes are free."""
        poll(
            lambda: self.run("sinfo", "-hN", "-o%T").stdout.split() == ["idle"] * self.nodes,
            60,
            "all nodes idle",
        )


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

        return poll(look, seconds, pattern, self.log)

    def ended(self, seconds: float = 900) -> tuple[str, str]:
        """Wait for the end: (state, exit code as Slurm writes it)."""
        state = poll(
            lambda: (s := self.show("JobState")) in ENDED and s, seconds, "end of job", self.log
        )
        return state, self.show("ExitCode")

    def signal_batch(self, name: str) -> None:
        """What Slurm itself does ahead of the time limit (--signal=B:…)."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def ranks(self) -> list[int]:
        """Process ids, as this machine sees them, of the ranks of this job."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                here = str(self.run_dir / "checkpoints").encode() in words
                if here and b"torch.distributed.run" not in words and b"-u" in words:
                    found.append(int(entry.name))
        return sorted(found)

    def losses(self) -> dict[int, float]:
        """step → plain cross entropy, from the progress lines of all legs."""
        return {
            int(step): float(loss)
            for step, loss in re.findall(r"step (\d+)/\d+ \| lm loss ([\d.]+)", self.text())
        }

    @property
    def success(self) -> bool:
        return (self.run_dir / "SUCCESS").exists()


def write_config(path: Path, flags: list[str], procs: int, cache: str, **settings: object) -> Path:
    """A configuration for CPU ranks of the tests' own Python."""
    lines = [
        f"PROCS_PER_NODE={procs} PREFLIGHT=0 OMP_NUM_THREADS=1 PYTHON={sys.executable}",
        f"export MEGATRON_DFT_DATA_CACHE={shlex.quote(cache)} TORCHDYNAMO_DISABLE=1",
        *(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()),
        f"TRAIN_ARGS=(--device cpu {shlex.join(flags)})",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
