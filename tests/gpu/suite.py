"""Runs sections of the GPU suite: `python -m tests.gpu.suite OUT [--dry-run|--rehearse] SECTION…`

Independent runs share the GPU; the training benchmark has it for itself. Prints a table, and keeps
OUT/results.json up to date, so that a suite that is cut off has said what it found. Status 0 only
if all holds.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu import check, processes, rehearsal
from tests.gpu.commands import chosen, command, heads, launch_words
from tests.gpu.lines import EVERY, SECTIONS
from tests.gpu.plan import DEFAULT, LIMITS, SHAPES, WHOLE, Run
from tests.gpu.table import Table
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
_AT_ONCE = 14  # of the tiny runs, on 16 cores
_PATIENCE = 20  # times the limits, in a rehearsal


class Suite:
    """Runs and their results; `out` holds logs, figures, models and the results.

    until: time.monotonic() at which all has to have ended.
    """

    def __init__(self, out: Path, until: float, rehearse: bool = False) -> None:
        self.out, self.until, self.rehearse = out, until, rehearse
        self.due = time.monotonic()  # the end of the sections so far, were each to take its limit
        self.done: dict[str, threading.Event] = {}
        self.made: dict[str, Future[int]] = {}
        self.threads = ThreadPoolExecutor(4)
        for name in ("logs", "figures", "gates"):
            (out / name).mkdir(parents=True, exist_ok=True)
        self.table = Table(out / "results.json", rehearsal=rehearse)
        self.note = self.table.note

    def left(self, until: float) -> float:
        """Seconds to a section's end or the suite's."""
        return min(until, self.until) - time.monotonic()

    def execute(self, name: str, words: list[str], limit: float) -> tuple[int, str, float]:
        """(exit status or TIME_IS_OUT, output, seconds)."""
        log, began = self.out / "logs" / f"{name.replace(' ', '-')}.log", time.monotonic()
        env = os.environ | {"MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            env |= rehearsal.ENVIRONMENT
        status = processes.run(words, log, limit, ROOT, env)
        return status, log.read_text(errors="replace"), time.monotonic() - began

    def start(self, run: Run, limit: float) -> tuple[int, str, float]:
        """As `execute`, of a run."""
        if not self.rehearse or run.program:
            return self.execute(run.name, command(run, self.out), limit)
        log, began = self.out / "logs" / f"{run.name}.log", time.monotonic()
        env = rehearsal.ENVIRONMENT | {"MASTER_PORT": str(free_port())}
        status = rehearsal.launch(launch_words(run, self.out), run.ranks, log, limit, env)
        return status, log.read_text(errors="replace"), time.monotonic() - began

    def skip(self, run: Run) -> str:
        """Why a run is left out; "" where it is not."""
        missing = [name for name in run.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{missing[0]} is not installed"
        return f"not on a CPU: {run.gpu}" if self.rehearse and run.gpu else ""

    def run(self, section: str, run: Run, until: float) -> str:
        """Its output; whatever goes wrong with it is a line of the table."""
        try:
            return self._run(section, run, until)
        except Exception as error:
            self.done[run.name].set()
            self.note(section, run.name, False, f"{error!r}"[:200], counts=run.counts)
            return ""

    def _run(self, section: str, run: Run, until: float) -> str:
        """Run it when those before it are done; judged when its reference is done too."""
        why = self.skip(run)
        if why:
            self.done[run.name].set()
            self.note(section, run.name, None, why)
            return ""
        if self.rehearse:
            run = rehearsal.here(run)
        for name in run.after:
            self.done[name].wait(max(self.left(until), 0))
        if self.left(until) <= 0:
            self.done[run.name].set()
            self.note(section, run.name, False, "not run: the time is out", counts=run.counts)
            return ""
        limit = run.limit * (4 if self.rehearse else 1)
        status, log, seconds = self.start(run, min(limit, self.left(until)))
        self.done[run.name].set()
        if run.like in self.done:
            self.done[run.like].wait(max(self.left(until), 0))
        reference = EVERY.get(run.like or "")
        holds, why = check.judge(run, status, log, self.out, reference)
        self.note(section, run.name, holds, why, seconds=seconds, counts=run.counts)
        return log

    def together(self, section: str, runs: list[Run], until: float) -> None:
        """All runs of a section, some at a time, what others wait for first."""
        awaited = {name for r in runs for name in r.awaited}
        # What another section would have run, where it is left out.
        missing = awaited - self.done.keys() - {r.name for r in runs}
        runs = [*runs, *(EVERY[name] for name in sorted(missing))]
        runs = sorted(runs, key=lambda r: (r.name not in awaited, bool(r.after)))
        self.done.update({r.name: threading.Event() for r in runs})
        at_once = (os.cpu_count() or 2) if self.rehearse else _AT_ONCE
        with ThreadPoolExecutor(min(at_once, _AT_ONCE)) as threads:
            list(threads.map(lambda r: self.run(section, r, until), runs))

    def _make(self, kind: str) -> int:
        words = [sys.executable, "-m", "tests.gpu.make_model", str(self.out / kind), kind]
        words += ["--tiny"] if self.rehearse else []
        status, log, _ = self.execute(f"make {kind}", words, self.left(self.until))
        if status:
            self.note("models", kind, False, (log.strip().splitlines() or [""])[-1][:200])
        return status

    def begin_models(self, sections: list[str]) -> None:
        """Make what the runs start from; the large ones are made while the tiny ones train."""
        runs = [r for name in sections for r in SECTIONS[name]]
        kinds = dict.fromkeys(r.model for r in runs)
        for kind in sorted(kinds, key=lambda k: k in SHAPES):
            if not (self.out / kind).exists():
                self.made[kind] = self.threads.submit(self._make, kind)

    def models(self, runs: list[Run]) -> None:
        """Wait for what these runs start from."""
        for kind in {r.model for r in runs} & self.made.keys():
            self.made[kind].result()

    def train(self, until: float) -> None:
        """The training benchmark: one run after another, beside the GPU's own matrix rate.

        While one trains the next imports and reads its data, and waits for its gate to open.
        """
        runs = SECTIONS["train"]
        rate = self._matrix_rate(until)
        self.done.update({r.name: threading.Event() for r in runs})
        times = {}
        gates = [self.out / "gates" / r.name for r in runs]
        with ThreadPoolExecutor(2) as threads:
            logs = [threads.submit(self.run, "train", r, until) for r in runs[:2]]
            for at, run in enumerate(runs):
                gates[at].touch()
                times[run.name] = check.step_ms(logs[at].result())
                if at + 2 < len(runs):
                    logs.append(threads.submit(self.run, "train", runs[at + 2], until))
        for row in check.judge_training(times, rate):
            self.note("train", **row)
        self._profile()

    def _matrix_rate(self, until: float) -> float | None:
        """TFLOPS; None in a rehearsal."""
        if self.rehearse:
            self.note("train", "matrix rate", None, "not on a CPU: it is the GPU's")
            return None
        words = [sys.executable, "-m", "tests.gpu.matrix_rate"]
        status, log, _ = self.execute("matrix rate", words, min(60, self.left(until)))
        rate = float(log.strip().splitlines()[-1]) if status == 0 else 1e-9
        self.note("train", "matrix rate", rate > 1, f"{rate:.0f} TFLOPS, bf16, 8,192³")
        return rate

    def _profile(self) -> None:
        path = self.out / "profile.json"
        if not path.is_file():
            return self.note("train", "profile", False, "was not written")
        found = json.loads(path.read_text())
        self.note("train", "profile", bool(found["kernels"]),
                  f"a step of dft: {found['span_ms']:.0f} ms, kernels {found['busy_ms']:.0f}, gaps "
                  f"{found['gap_ms']:.0f}")  # fmt: skip
        for name, ms, calls in found["kernels"][:20]:
            print(f"  {ms:8.2f} ms {int(calls):6d} × {name[:90]}")
        return None

    def heads(self, until: float) -> None:
        """The checks together, then the benchmark, which has the GPU for itself."""

        def line(what: str, words: list[str], gpu: str) -> None:
            if self.rehearse and gpu:
                return self.note("heads", what, None, f"not on a CPU: {gpu}")
            if self.left(until) <= 0:
                return self.note("heads", what, False, "not run: the time is out")
            status, log, seconds = self.execute(what, words, self.left(until))
            last = (log.strip().splitlines() or [""])[-1][:120]
            return self.note("heads", what, status == 0, last, seconds=seconds)

        *checks, benchmark = heads(self.out, self.rehearse)
        with ThreadPoolExecutor(1 if self.rehearse else 3) as threads:
            list(threads.map(lambda found: line(*found), checks))
        line(*benchmark)

    def section(self, name: str) -> None:
        """Run one section within its time limit, and what the sections before it have left."""
        self.due += LIMITS[name] * (_PATIENCE if self.rehearse else 1)
        until = self.due
        self.models(SECTIONS[name])
        if name == "train":
            self.train(until)
        elif name == "heads":
            self.heads(until)
        else:
            self.together(name, SECTIONS[name], until)


def _dry(sections: list[str], out: Path) -> None:
    for name in sections:
        print(f"== {name}: at most {LIMITS[name]} s")
        for run in SECTIONS[name]:
            print(f"{run.name}: {shlex.join(command(run, out))}")
        for what, words, _ in heads(out, False) if name == "heads" else []:
            print(f"{what}: {shlex.join(words)}")
    print(f"at most {min(WHOLE, sum(LIMITS[n] for n in sections))} s")


def _cut_off(*_: Any) -> None:
    processes.end_all()
    os._exit(1)


def main() -> int:
    """0 only if all holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", metavar="NAME,…", help="these and what they wait for")
    parser.add_argument("--spent", type=float, default=0.0, help="[s] of the whole, before this")
    parser.add_argument("sections", nargs="*")
    args = parser.parse_intermixed_args()
    sections = args.sections or list(DEFAULT)
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        print(f"no such section: {unknown[0]}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    for name in sections:
        SECTIONS[name] = chosen(SECTIONS[name], args.only)
    if args.dry_run:
        _dry(sections, args.out)
        return 0
    if (args.out / "results.json").exists():
        print(f"{args.out} has the results of another suite; give a new --out", file=sys.stderr)
        return 2
    whole = WHOLE * (_PATIENCE if args.rehearse else 1) - args.spent
    suite = Suite(args.out.resolve(), time.monotonic() + whole, args.rehearse)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _cut_off)
    suite.begin_models(sections)
    for name in sections:
        suite.section(name)
    print(suite.table.last_line())
    return 1 if suite.table.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
