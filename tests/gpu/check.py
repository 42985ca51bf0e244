"""What has to hold of a run's figures: judged from files, on any machine."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tests.gpu.bounds import BOUNDS
from tests.gpu.plan import Run, parameters

_ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_DRIFT = re.compile(r"drift at step \d+: norm ([0-9.e+-]+)")
TOKENS = 4 * 4096  # a step of the training benchmark
TOLD = ("dft-drift-anchor", "asft-reference", "dft-megatron-ce")  # measured, without a goal
GOAL = {"1.5b": 0.45, "8b": 0.50}  # of the GPU's own matrix rate


def figures(path: Path) -> dict[int, dict[str, float]]:
    """step → its figures, of the file that launch.py writes."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {int(row["step"]): row for row in rows}


def apart(
    found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]], name: str
) -> tuple[float, float]:
    """Relative difference of a figure at the first common step, and the largest at any."""
    errors = [
        abs(found[step][name] - expected[step][name]) / max(abs(expected[step][name]), 1e-12)
        for step in sorted(found.keys() & expected.keys())
    ]
    return errors[0], max(errors)


def exports(run: Run, work: Path) -> Path | None:
    """Where the run exports its weights; None where it does not."""
    name = run.flags.get("save_hf")
    return None if name is None else Path(str(name).replace("WORK", str(work)))


def update_error(found: Path, expected: Path, start: Path) -> float:
    """The worst tensor's ‖found − expected‖ / ‖expected − start‖ of exported checkpoints: 0 for the
    same training, about 1 where a tensor's gradient was lost."""
    from safetensors.torch import load_file

    got, want, base = (
        {n: t.double() for f in sorted(d.glob("*.safetensors")) for n, t in load_file(f).items()}
        for d in (found, expected, start)
    )
    if got.keys() != want.keys():
        return float("inf")
    return max(float((got[n] - want[n]).norm() / (want[n] - base[n]).norm()) for n in want)


def drift(log: str) -> float | None:
    """The norm of the update in the last line that tells it."""
    found = _DRIFT.findall(log)
    return float(found[-1]) if found else None


def judge(run: Run, status: int, log: str, work: Path, reference: Run | None = None):
    """(whether all holds, why not or what was measured). reference: the run of run.like."""
    if run.status is not None and status != run.status:
        words = [line for line in log.splitlines() if "rror" in line]
        end = "the time is out" if status < 0 else f"exit status {status}, expected {run.status}"
        return False, f"{end}; {' '.join(words[-1:])[:200]}"
    missing = [text for text in run.says if text not in log]
    if missing:
        return False, f"does not say {missing[0]!r}"
    if run.like is None:
        return True, ""
    found = figures(work / "figures" / f"{run.name}.jsonl")
    expected = figures(work / "figures" / f"{run.like}.jsonl")
    if "load" in run.flags and 1 in found:
        return False, "does not go on from the checkpoint: it begins at step 1"
    if not found.keys() & expected.keys():
        return False, f"no step in common with {run.like}"
    bound, holds, parts = BOUNDS[run.bound], True, []
    for name in ("lm loss", "grad_norm"):
        first, largest = apart(found, expected, name)
        at_first, at_any = bound[name]
        # The first step of a run that goes on from a checkpoint is a later one.
        at_first = at_first if 1 in found else at_any
        holds = holds and first <= at_first and largest <= at_any
        parts.append(f"{name} {first:.1e}, {largest:.1e}")
    more = _others(run, log, work, reference) if reference is not None else []
    for name, error in more:
        holds = holds and error <= bound[name][1]
        parts.append(f"{name} {error:.1e}")
    return holds, f"from {run.like}, at first and at most: {'; '.join(parts)}"


def _others(run: Run, log: str, work: Path, reference: Run) -> list[tuple[str, float]]:
    """Errors of what some runs have beside their steps: exported weights, drift from the base."""
    errors = []
    ours, theirs = exports(run, work), exports(reference, work)
    if ours is not None and theirs is not None:
        error = update_error(ours, theirs, work / run.model / "model")
        errors.append(("weights", error))
    there = (work / "logs" / f"{reference.name}.log").read_text(errors="replace")
    norms = drift(log), drift(there)
    if norms[1] is not None:
        errors.append(("drift", abs((norms[0] or 0.0) / norms[1] - 1)))
    return errors


def step_ms(log: str, last: int = 8) -> float | None:
    """Median time of the last steps, ms, of Megatron's log."""
    found = [float(value) for value in _ELAPSED.findall(log)]
    return statistics.median(found[-last:]) if len(found) >= last else None


def share(kind: str, milliseconds: float, matrix_tflops: float) -> float:
    """Of the GPU's matrix rate: 6 FLOP a weight and token, attention's products not counted."""
    flops = 6 * sum(parameters(kind)) * TOKENS
    return flops / (milliseconds / 1e3) / 1e12 / matrix_tflops


def judge_training(
    times: dict[str, float | None], matrix_tflops: float | None
) -> list[dict[str, Any]]:
    """The rows of the training benchmark; times: run → ms a step. matrix_tflops: None where it is
    no GPU's, and the goals mean nothing."""
    rows: list[dict[str, Any]] = []
    for name in TOLD:
        told = "no step was timed" if (ms := times.get(name)) is None else f"{ms:.0f} ms a step"
        rows.append({"name": f"train {name}", "holds": ms is not None, "ms": ms, "why": told,
                     "counts": False})  # fmt: skip
    if matrix_tflops is None:
        timed = all(times.get(name) for name in ("plain-ce", "dft", "dft-chunk", "8b-dft-chunk"))
        return [*rows, {"name": "train goals", "holds": None if timed else False,
                        "why": "not on a CPU: the goals are a GPU's; every run was timed: "
                               f"{timed}"}]  # fmt: skip
    for name, kind in (("dft", "1.5b"), ("dft-chunk", "1.5b"), ("8b-dft-chunk", "8b")):
        ms = times.get(name)
        if ms is None:
            rows.append({"name": f"train {name}", "holds": False, "why": "no step was timed"})
            continue
        part = share(kind, ms, matrix_tflops)
        rows.append({
            "name": f"train {name}", "holds": part >= GOAL[kind], "ms": ms, "share": part,
            "why": f"{ms:.0f} ms a step, {100 * part:.0f} % of the matrix rate "
                   f"(goal {100 * GOAL[kind]:.0f})",
        })  # fmt: skip
    plain, dft = times.get("plain-ce"), times.get("dft")
    holds = plain is not None and dft is not None and dft <= 1.02 * plain
    ratio = f"{dft / plain:.3f}" if plain and dft else "not timed"
    rows.append({"name": "train dft over plain cross entropy", "holds": holds,
                 "why": f"{ratio} (goal 1.00, noise 0.02)"})  # fmt: skip
    return rows
