"""What has to hold of a run's figures: judged from files, on any machine."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tests.gpu.plan import STEP, Run, parameters

_ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
TOKENS = 4 * 4096  # a step of the training benchmark
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


def judge(run: Run, status: int, log: str, work: Path) -> tuple[bool, str]:
    """(whether all holds, why not or what was measured)."""
    if status != run.status:
        words = [line for line in log.splitlines() if "rror" in line]
        return False, f"exit status {status}, expected {run.status}; {' '.join(words[-1:])[:200]}"
    missing = [text for text in run.says if text not in log]
    if missing:
        return False, f"does not say {missing[0]!r}"
    if run.like is None:
        return True, ""
    found = figures(work / "figures" / f"{run.name}.jsonl")
    expected = figures(work / "figures" / f"{run.like}.jsonl")
    if not found.keys() & expected.keys():
        return False, f"no step in common with {run.like}"
    holds, parts = True, []
    for name, (at_first, at_any) in STEP[run.bound].items():
        if run.after:
            at_first = at_any  # a resumed run's first step is the third
        first, largest = apart(found, expected, name)
        holds = holds and first <= at_first and largest <= at_any
        parts.append(f"{name} {first:.1e}, {largest:.1e}")
    return holds, f"from {run.like}, at first and at most: {'; '.join(parts)}"


def step_ms(log: str, last: int = 8) -> float | None:
    """Median time of the last steps, ms, of Megatron's log."""
    found = [float(value) for value in _ELAPSED.findall(log)]
    return statistics.median(found[-last:]) if len(found) >= last else None


def share(kind: str, milliseconds: float, matrix_tflops: float) -> float:
    """Of the GPU's matrix rate: 6 FLOP a weight and token, attention's products not counted."""
    flops = 6 * sum(parameters(kind)) * TOKENS
    return flops / (milliseconds / 1e3) / 1e12 / matrix_tflops


def judge_training(times: dict[str, float | None], matrix_tflops: float) -> list[dict[str, Any]]:
    """The rows of the training benchmark; times: run → ms a step."""
    rows = []
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
