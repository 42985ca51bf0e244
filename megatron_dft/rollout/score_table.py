"""Several checkpoints on several sets: the figures, a table on the terminal, JSON, a picture."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dft.rollout import metrics
from megatron_dft.rollout.metrics import Estimate, Scored
from megatron_dft.rollout.rewards import Rewarded
from megatron_dft.storage.files import write_whole

Scores = dict[str, Estimate]


def score(
    rewarded: Sequence[Rewarded], threshold: float, name: str
) -> tuple[Scores, dict[str, Any]]:
    """The estimates of one checkpoint on the set `name`, and what to say beside them.

    A sample without a reward counts as wrong, and is counted.
    """
    prompts = []
    for _, group in groupby(rewarded, key=lambda one: one.prompt.number):
        members = list(group)
        right = [one.reward is not None and one.reward >= threshold for one in members]
        prompts.append(Scored(right, [one.verdict.answer for one in members]))
    k = max(len(p.right) for p in prompts)
    scores: Scores = {"pass@1": metrics.pass_at_1(prompts)}
    # One seed a set: checkpoints are resampled alike, sets of one size are not.
    scores[f"avg@{k}"] = metrics.average_at_k(prompts, seed=zlib.crc32(name.encode()))
    scores[f"maj@{k}"] = metrics.majority_at_k(prompts)
    return scores, {
        "prompts": len(prompts),
        "samples": k,
        "without a reward": sum(one.reward is None for one in rewarded),
        "cut off": sum(one.finish != "stop" for one in rewarded),
    }


def average_name(scores: Mapping[str, Mapping[str, Scores]]) -> str:
    first = next(iter(next(iter(scores.values())).values()))
    return next(name for name in first if name.startswith("avg@"))


def as_json(
    scores: Mapping[str, Mapping[str, Scores]], notes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """label → set → figure → value, low, high; and each checkpoint's gain over those before it."""
    name, labels = average_name(scores), list(scores)
    result: dict[str, Any] = {"format": 1, "interval": metrics.LEVEL, "scores": {}, "gains": {}}
    for label, sets in scores.items():
        result["scores"][label] = {
            s: {**{n: e.record() for n, e in found.items()}, **notes[label][s]}
            for s, found in sets.items()
        }
        if len(sets) > 1:
            mean = metrics.mean_of([found[name] for found in sets.values()])
            result["scores"][label]["mean"] = {name: mean.record()}
    for earlier, later in combinations(labels, 2):
        before, after = scores[earlier], scores[later]
        gains = {s: metrics.difference(after[s][name], before[s][name]) for s in after}
        if len(gains) > 1:
            gains["mean"] = metrics.mean_of(list(gains.values()))
        result["gains"][f"{later} over {earlier}"] = {s: e.record() for s, e in gains.items()}
    return result


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table: a row a checkpoint, a column a set; percent with the 95 % interval."""
    labels, sets = list(result["scores"]), list(next(iter(result["scores"].values())))
    names = [n for n, v in result["scores"][labels[0]][sets[0]].items() if isinstance(v, dict)]
    names = names[:1] if _is_one_sample(names) else names
    for name in names:
        table = Table(title=f"{name}, % [95 % interval]")
        for column in ("", *sets):
            table.add_column(column, justify="right" if column else "left")
        for label in labels:
            found = result["scores"][label]
            table.add_row(label, *(_cell(found[s].get(name)) for s in sets))
        console.print(table)
    for gain, by_set in result["gains"].items():
        said = ", ".join(f"{s} {_cell(e, sign='+')}" for s, e in by_set.items())
        console.print(f"{gain}: {said}", highlight=False, markup=False, soft_wrap=True)


def _is_one_sample(names: Sequence[str]) -> bool:
    """With one sample a prompt, pass@1, Avg@1 and maj@1 are one figure."""
    return len(names) > 1 and names[1] == "avg@1"


def _cell(estimate: Mapping[str, float] | None, sign: str = "") -> str:
    if estimate is None:
        return "–"
    value, low, high = (100 * estimate[n] for n in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f} … {high:{sign}.1f}]"


def picture(result: Mapping[str, Any]) -> bytes:
    """PNG: a group of bars a set, a bar a checkpoint, with its 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, sets = list(result["scores"]), list(next(iter(result["scores"].values())))
    first = result["scores"][labels[0]][sets[0]]
    name = next(n for n in first if n.startswith("avg@"))
    figure = Figure(figsize=(max(6.0, 1.6 + 1.5 * len(sets)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        found = [result["scores"][label][s][name] for s in sets]
        values = [100 * e["value"] for e in found]
        below = [max(0.0, 100 * (e["value"] - e["low"])) for e in found]
        above = [max(0.0, 100 * (e["high"] - e["value"])) for e in found]
        places = [at - 0.4 + width * (i + 0.5) for at in range(len(sets))]
        axes.bar(places, values, 0.92 * width, label=label)
        axes.errorbar(places, values, [below, above], fmt="none", ecolor="#333", capsize=3, lw=1)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel(f"{name} (%), 95 % interval")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write(directory: Path, result: Mapping[str, Any]) -> None:
    """scores.json and scores.png."""
    write_whole(directory / "scores.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (directory / "scores.png").write_bytes(picture(result))
