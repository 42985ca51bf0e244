"""The drift report on disk: drift.json, drift.csv, report.html and a PNG of each picture."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from megatron_dft.drift import columns, drift_sections, retention_report
from megatron_dft.drift.labels import model_name
from megatron_dft.drift.page import Section, render
from megatron_dft.storage.files import read_json_object, write_whole

FORMAT = 2  # of drift.json and retention.json


def to_csv(report: dict[str, Any]) -> str:
    """One line for each method and each of: model, layers, module types, tensors."""
    ks = columns.principal_ks(report)
    fields = (*columns.MODEL, *columns.SPECTRAL)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [f"principal_{share}_{k}" for k in ks for share in columns.SHARES]
    writer.writerow(("method", "level", "name", *fields, *names))
    for label, method in report["methods"].items():
        levels = {"model": {"model": method["model"]}}
        levels |= {k: method[k + "s"] for k in ("layer", "module", "tensor")}
        for level, rows in levels.items():
            for name, row in rows.items():
                shares = [columns.principal(row, k, s) for k in ks for s in columns.SHARES]
                writer.writerow((label, level, name, *(row.get(c) for c in fields), *shares))
    return buffer.getvalue().encode("utf-8", "replace").decode("utf-8")


def _read(file: Path) -> dict[str, Any]:
    """A half that was written before; ValueError where another release wrote it."""
    half = read_json_object(file)
    if half.get("format") != FORMAT:
        raise ValueError(
            f"--out: {file} is of format {half.get('format')}, expected {FORMAT}; run "
            f"megatron-dft {file.stem} again, or choose another directory"
        )
    return half


def write(directory: Path, drift: dict[str, Any] | None, retention: dict[str, Any] | None) -> None:
    """Write what is given, and the page of both: a half that is None is read from `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {"drift": drift, "retention": retention}
    for name, half in halves.items():
        file = directory / f"{name}.json"
        if half is not None:
            write_whole(file, json.dumps(half, indent=1, allow_nan=False))
        elif file.is_file():
            halves[name] = _read(file)
    parts: list[Section] = []
    if (found := halves["drift"]) is not None:
        write_whole(directory / "drift.csv", to_csv(found))
        parts += drift_sections.sections(found)
    if (found := halves["retention"]) is not None:
        kept = retention_report.sections(found)
        # What was kept is the first thing a reader asks after the overview.
        parts[1:1] = kept if parts else []
        parts = parts or kept
    for part in parts:
        for picture in part.pictures:
            write_whole(directory / picture.name, picture.png)
    source = halves["drift"] or halves["retention"] or {}
    title = f"What fine-tuning did to {model_name(str(source.get('base', 'the model')))}"
    tuned = ", ".join(f"{k} = {v}" for k, v in source.get("tuned", {}).items())
    subtitle = f"base {source.get('base', '')} · {tuned}"
    write_whole(directory / "report.html", render(title, subtitle, parts))
