"""A comparison of runs on disk: compare.html, compare.json, compare.csv and the pictures."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dft.drift import run_conclusions, run_plots
from megatron_dft.drift.labels import model_name
from megatron_dft.drift.page import Cell, Picture, Section, Table, render
from megatron_dft.drift.run_figures import differing, groups_by_rate, row
from megatron_dft.drift.run_log import Run
from megatron_dft.storage.files import write_whole

FORMAT = 1  # of compare.json
_SETTINGS = 4  # that differ, in the table of runs; all are in the one below


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[Cell]]]:
    """(columns, rows): a run's settings that differ, and its figures; no column of dashes."""
    settings = dict(list(differing(runs).items())[:_SETTINGS])
    rows = [row(run) for run in runs]
    fields = [name for name in rows[0] if any(r[name] is not None for r in rows)]
    return ["run", *settings, *fields], [
        [run.label, *(values[i] for values in settings.values()), *(r[name] for name in fields)]
        for i, (run, r) in enumerate(zip(runs, rows, strict=True))
    ]


def _settings_table(runs: Sequence[Run]) -> Table:
    rows: list[list[Cell]] = []
    for name, values in differing(runs).items():
        for value in dict.fromkeys(values):
            having = [r.label for r, v in zip(runs, values, strict=True) if v == value]
            rows.append([name, value, ", ".join(having)])
    return Table(("setting", "value", "runs"), rows, "All settings that differ.", folded=True)


def _overview(runs: Sequence[Run]) -> Section:
    columns, rows = table(runs)
    note = (
        "lm loss is plain cross entropy whatever was minimised, in nats a token, and grad norm the "
        "norm before clipping: means of the last tenth of the steps. Held out: the last "
        "evaluation, then the lowest. p, accuracy and end p: held-out where evaluated. Hours: "
        "between the first figure and the last of each start."
    )
    return Section(
        "The runs",
        run_conclusions.warnings(runs),
        tables=[Table(columns, rows, note), _settings_table(runs)],
        verdict=run_conclusions.verdict(runs),
    )


def sections(runs: Sequence[Run]) -> list[Section]:
    """The page's parts; what was not logged has none."""
    found = [
        _overview(runs),
        Section(
            "Cross entropy",
            ["In training: the mean of the last fiftieth of the run up to each step."],
            [Picture("cross_entropy.png", run_plots.cross_entropy(runs))],
            meaning=run_conclusions.cross_entropy(runs),
        ),
        Section(
            "Probability and accuracy",
            [],
            [Picture("confidence.png", run_plots.confidence(runs))],
            meaning=run_conclusions.confidence(runs),
        ),
    ]
    if groups := groups_by_rate(runs):
        picture = Picture("by_rate.png", run_plots.by_rate(groups))
        meaning = run_conclusions.by_rate(runs)
        found.insert(1, Section("Over the learning rate", [], [picture], meaning=meaning))
    found.append(
        Section(
            "Gradient and rate",
            [],
            [Picture("optimizer.png", run_plots.optimizer(runs))],
            meaning=run_conclusions.optimizer(runs),
        )
    )
    return found


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue().encode("utf-8", "replace").decode("utf-8")


def _json(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "differing": differing(runs),
        "runs": {
            run.label: {"directory": str(run.directory), **row(run), "figures": run.figures}
            for run in runs
        },
    }


def write(directory: Path, runs: Sequence[Run]) -> Path:
    """Write the comparison; the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = sections(runs)
    for part in parts:
        for picture in part.pictures:
            write_whole(directory / picture.name, picture.png)
    write_whole(directory / "compare.json", json.dumps(_json(runs), indent=1, allow_nan=False))
    write_whole(directory / "compare.csv", _csv(*table(runs)))
    models = {run.settings.get("hf_model", "") for run in runs} - {"", "None"}
    name = f" of {model_name(models.pop())}" if len(models) == 1 else ""
    count = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    subtitle = " · ".join(str(run.directory) for run in runs)
    page = directory / "compare.html"
    write_whole(page, render(f"{count}{name}, side by side", subtitle, parts))
    return page
