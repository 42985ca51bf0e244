"""What a comparison of runs says of each: the settings that differ, and where its figures ended."""

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_dft.drift.run_log import Run, Series

CROSS_ENTROPY, PROB, ACCURACY = "lm loss", "dft/mean-prob", "dft/token-accuracy"
END_PROB, GRAD_NORM, RATE = "dft/end-prob", "grad-norm", "learning-rate"
HELD_OUT = " validation"
FIRST_SETTINGS = ("loss", "lr")
_COUNTERS = ("iteration", "rank", "local_rank", "num_floating_point_operations_so_far")
_PATHS = ("save", "load", "save_hf", "tensorboard_dir", "stop_file", "wandb_save_dir")


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """setting → its value in each run, where not all are equal; loss and lr first.

    What says where the run is kept or how far it is, is no setting.
    """
    names = {name: None for run in runs for name in run.settings}
    found = {
        name: [run.settings.get(name, "–") for run in runs]
        for name in names
        if name not in _PATHS and name not in _COUNTERS and "consumed_" not in name
    }
    varied = {name: values for name, values in found.items() if len(set(values)) > 1}
    # A run from which no settings were read differs from the others in all of them.
    if not all(run.settings for run in runs):
        varied = {name: values for name, values in varied.items() if name in FIRST_SETTINGS}
    first = {name: varied[name] for name in FIRST_SETTINGS if name in varied}
    return first | varied


def groups_by_rate(runs: Sequence[Run]) -> dict[str, list[tuple[float, Run]]]:
    """name → (learning rate, run): runs that are alike but for the rate, where there are two."""
    others = [name for name in differing(runs) if name not in ("lr", "min_lr")]
    groups: dict[tuple[str, ...], list[tuple[float, Run]]] = {}
    for run in runs:
        rate = run.number("lr")
        if rate:
            key = tuple(run.settings.get(name, "–") for name in others)
            groups.setdefault(key, []).append((rate, run))
    if all(len({rate for rate, _ in members}) < 2 for members in groups.values()):
        return {}
    ordered = {key: sorted(members, key=lambda m: m[0]) for key, members in groups.items()}
    return {", ".join(key) or "all runs": members for key, members in ordered.items()}


def held_out(run: Run, tag: str) -> tuple[str, Series]:
    """(tag, series) on held-out data where it was evaluated, else in training."""
    name = tag + HELD_OUT if run.figures.get(tag + HELD_OUT) else tag
    return name, run.figures.get(name, {})


def last(series: Series) -> float | None:
    return series[max(series)] if series else None


def late_mean(series: Series) -> float | None:
    """Mean of the last tenth of the steps: single training steps differ by their batch."""
    steps = sorted(series)
    return (
        statistics.fmean(series[s] for s in steps[-max(1, len(steps) // 10) :]) if steps else None
    )


def best(series: Series) -> tuple[int, float] | None:
    """(step, figure) of the least."""
    if not series:
        return None
    step = min(series, key=lambda s: (series[s], s))
    return step, series[step]


def row(run: Run) -> dict[str, Any]:
    """The figures of one run by the names of the table's columns."""
    evaluated = run.figures.get(CROSS_ENTROPY + HELD_OUT, {})
    lowest = best(evaluated)
    total = run.settings.get("train_iters", "")
    return {
        "status": run.status or "–",
        "step": run.step,
        "of": int(total) if total.isdecimal() else None,
        "lm loss": late_mean(run.figures.get(CROSS_ENTROPY, {})),
        "held-out lm loss": last(evaluated),
        "lowest": lowest[1] if lowest else None,
        "at step": lowest[0] if lowest else None,
        "mean p": last(held_out(run, PROB)[1]),
        "accuracy": last(held_out(run, ACCURACY)[1]),
        "end p": last(held_out(run, END_PROB)[1]),
        "grad norm": late_mean(run.figures.get(GRAD_NORM, {})),
        "hours": run.seconds / 3600,
    }
