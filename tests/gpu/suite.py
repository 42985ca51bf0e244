"""Runs sections of the GPU suite: `python -m tests.gpu.suite OUT [--dry-run] SECTION…`

Independent runs share the GPU; the training benchmark has it for itself. Prints a table, writes
OUT/results.json; status 0 only if all holds.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu import check
from tests.gpu.plan import LIMITS, SECTIONS, Run, command_line
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
_AT_ONCE = 10


def command(run: Run, work: Path) -> list[str]:
    """The run's whole command."""
    figures = [] if run in SECTIONS["train"] else ["--figures", f"WORK/figures/{run.name}.jsonl"]
    start = [sys.executable, "-m"]
    if run.ranks > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={run.ranks}",
                  f"--master-port={free_port()}", "-m"]  # fmt: skip
    launch = [word.replace("WORK", str(work)) for word in (*run.launch, *figures)]
    return [*start, "tests.gpu.launch", *launch, "--", *command_line(run, work)]


def heads(out: Path) -> list[tuple[str, list[str]]]:
    """(name, command) of the loss heads' tests and benchmark, where they are in the tree."""
    python = sys.executable
    found = [("objectives", [python, "-m", "tests.gpu.objectives"])]
    tests, benchmark = "tests/gpu/test_heads.py", "tools/benchmark_loss.py"
    if (ROOT / tests).is_file() and importlib.util.find_spec("pytest"):
        found.append(("head tests", [python, "-m", "pytest", "-q", tests]))
    if (ROOT / benchmark).is_file():
        shares = ["--supervised", "1.0", "0.5", "--repeats", "5"]
        found.append(("loss benchmark", [python, benchmark, *shares, "--out", str(out / "loss")]))
    return found


class Suite:
    """Runs and their results; `out` holds logs, figures, models and the results."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows = out, []
        self.done: dict[str, threading.Event] = {}
        for name in ("logs", "figures"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def execute(self, name: str, words: list[str], limit: float) -> tuple[int, str, float]:
        """(exit status or −1 for the time limit, output, seconds)."""
        log, began = self.out / "logs" / f"{name.replace(' ', '-')}.log", time.monotonic()
        env = os.environ | {"MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
        with log.open("w") as file:
            try:
                status = subprocess.run(
                    words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
                    timeout=max(limit, 1),
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = -1
        return status, log.read_text(errors="replace"), time.monotonic() - began

    def note(self, section: str, name: str, holds: bool, why: str, **more: Any) -> None:
        row = {"section": section, "name": name, "holds": holds, "why": why, **more}
        self.rows.append(row)
        verdict = "ok" if holds else "FAILED" if more.get("counts", True) else "no"
        print(f"{section:7} {verdict:7} {name:26} {more.get('seconds', 0.0):6.1f} s  {why}",
              flush=True)  # fmt: skip

    def run(self, section: str, run: Run, until: float) -> str:
        """Run it when those before it are done; judged when its reference is done too."""
        for name in run.after:
            self.done[name].wait(max(until - time.monotonic(), 0))
        limit = min(run.limit, until - time.monotonic())
        status, log, seconds = self.execute(run.name, command(run, self.out), limit)
        self.done[run.name].set()
        if run.like in self.done:
            self.done[run.like].wait(max(until - time.monotonic(), 0))
        holds, why = check.judge(run, status, log, self.out)
        self.note(section, run.name, holds, why, seconds=seconds, counts=run.counts)
        return log

    def together(self, section: str, runs: list[Run], until: float) -> None:
        """All runs of a section, some at a time, what others wait for first."""
        awaited = {name for r in runs for name in (*r.after, r.like)}
        runs = sorted(runs, key=lambda r: (r.name not in awaited, bool(r.after)))
        self.done.update({r.name: threading.Event() for r in runs})
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(lambda r: self.run(section, r, until), runs))

    def models(self, runs: list[Run]) -> None:
        """Make what the runs start from."""
        kinds = sorted({r.model for r in runs if not (self.out / r.model).exists()})

        def make(kind: str) -> tuple[int, str, float]:
            words = [sys.executable, "-m", "tests.gpu.make_model", str(self.out / kind), kind]
            return self.execute(f"make {kind}", words, 120)

        with ThreadPoolExecutor(4) as threads:
            for kind, (status, log, _) in zip(kinds, threads.map(make, kinds), strict=True):
                if status:
                    self.note("models", kind, False, log.strip().splitlines()[-1][:200])

    def train(self, until: float) -> None:
        """The training benchmark: one run after another, beside the GPU's own matrix rate."""
        status, log, _ = self.execute(
            "matrix rate", [sys.executable, "-m", "tests.gpu.matrix_rate"], 60
        )
        rate = float(log.strip().splitlines()[-1]) if status == 0 else 0.0
        self.note("train", "matrix rate", rate > 0, f"{rate:.0f} TFLOPS, bf16, 8,192³")
        self.done.update({r.name: threading.Event() for r in SECTIONS["train"]})
        times = {r.name: check.step_ms(self.run("train", r, until)) for r in SECTIONS["train"]}
        for row in check.judge_training(times, max(rate, 1e-9)):
            self.note("train", **row)
        self._profile()

    def _profile(self) -> None:
        path = self.out / "profile.json"
        if not path.is_file():
            return
        found = json.loads(path.read_text())
        print(f"one step of dft: {found['span_ms']:.0f} ms, kernels {found['busy_ms']:.0f}, gaps "
              f"{found['gap_ms']:.0f}")  # fmt: skip
        for name, ms, calls in found["kernels"][:20]:
            print(f"  {ms:8.2f} ms {int(calls):6d} × {name[:90]}")

    def section(self, name: str) -> None:
        """Run one section within its time limit."""
        until = time.monotonic() + LIMITS[name]
        self.models(SECTIONS[name])
        if name == "train":
            return self.train(until)
        if name == "heads":
            for what, words in heads(self.out):
                status, log, seconds = self.execute(what, words, until - time.monotonic())
                last = (log.strip().splitlines() or [""])[-1][:120]
                self.note("heads", what, status == 0, last, seconds=seconds)
            return None
        return self.together(name, SECTIONS[name], until)


def _dry(sections: list[str], out: Path) -> None:
    for name in sections:
        print(f"== {name}: at most {LIMITS[name]} s")
        for run in SECTIONS[name]:
            print(f"{run.name}: {shlex.join(command(run, out))}")
        for what, words in heads(out) if name == "heads" else []:
            print(f"{what}: {shlex.join(words)}")
    print(f"at most {sum(LIMITS[n] for n in sections)} s")


def main() -> int:
    """0 only if all holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("sections", nargs="*")
    args = parser.parse_intermixed_args()
    sections = args.sections or ["start", "parity", "heads", "train"]
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        print(f"no such section: {unknown[0]}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    if args.dry_run:
        _dry(sections, args.out)
        return 0
    suite, began = Suite(args.out.resolve()), time.monotonic()
    for name in sections:
        suite.section(name)
    bad = [r["name"] for r in suite.rows if not r["holds"] and r.get("counts", True)]
    content = {"seconds": time.monotonic() - began, "all_hold": not bad, "rows": suite.rows}
    (args.out / "results.json").write_text(json.dumps(content, indent=1, default=str))
    print(f"{len(suite.rows)} lines in {content['seconds']:.0f} s, failed: {bad or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
