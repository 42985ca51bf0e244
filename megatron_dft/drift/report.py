"""The drift report on disk: drift.json, drift.csv, report.html and a PNG of each picture."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from megatron_dft.drift import plots, retention_report
from megatron_dft.drift.page import Picture, Section, Table, render
from megatron_dft.storage.files import read_json_object, write_whole

_COLUMNS = (
    "parameters",
    "base_norm",
    "update_norm",
    "relative_norm",
    "max_abs",
    "mean",
    "mean_abs",
    "unchanged_bf16",
    "unchanged_1e-5",
    "top1pct_share",
    "gini",
)
_TENSOR_COLUMNS = (
    *_COLUMNS,
    "sigma1",
    "sigma1_error",
    "stable_rank",
    "top_singular_share",
    "top4_singular_share",
)


def to_csv(report: dict[str, Any]) -> str:
    """One line for each method and each of: model, layers, module types, tensors."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("method", "level", "name", *_TENSOR_COLUMNS))
    for label, method in report["methods"].items():
        levels = {"model": {"model": method["model"]}}
        levels |= {k: method[k + "s"] for k in ("layer", "module", "tensor")}
        for level, rows in levels.items():
            for name, row in rows.items():
                writer.writerow((label, level, name, *(row.get(c) for c in _TENSOR_COLUMNS)))
    return buffer.getvalue().encode("utf-8", "replace").decode("utf-8")


def _overview(report: dict[str, Any]) -> Section:
    rows = [
        [label, *(method["model"][c] for c in _COLUMNS)]
        for label, method in report["methods"].items()
    ]
    return Section(
        "Overview",
        [
            "Δ = tuned − base. relative_norm is ‖Δ‖/‖base‖; unchanged_bf16 the share of weights "
            "whose bfloat16 value is the same before and after, unchanged_1e-5 the share with "
            "|Δ| ≤ 1e-5; top1pct_share the share of ‖Δ‖² in the largest 1 % of entries; gini 0 "
            "means all weights moved alike, near 1 that few did. The last two come from a "
            "histogram and are exact to "
            f"{report['histogram_error']:.4f}.",
            *report.get("notes", ()),
        ],
        tables=[Table(("method", *_COLUMNS), rows)],
    )


def _token_tables(report: dict[str, Any]) -> list[Table]:
    tables: list[Table] = []
    for label, method in report["methods"].items():
        for name, rows in method["tokens"].items():
            caption = (
                f"{label} · {name}: {rows['changed_rows']:,} of {rows['rows']:,} rows changed, "
                f"median ‖Δ_row‖ {rows['median_norm']:.3g}; the most changed:"
            )
            body = [[t.get("text", ""), t["id"], t["norm"], t["relative"]] for t in rows["top"]]
            columns = ("token", "id", "‖Δ_row‖", "relative")
            tables.append(Table(columns, body, caption, folded=bool(tables)))
    return tables


def sections(report: dict[str, Any]) -> list[Section]:
    """The page's sections, pictures drawn."""

    def picture(name: str, png: bytes, caption: str) -> Picture:
        return Picture(f"{name}.png", png, caption)

    result = [
        _overview(report),
        Section(
            "Layers and modules",
            pictures=[
                picture("layers", plots.layers(report), "Which depth moved, and how sparsely."),
                picture("modules", plots.modules(report), "Which kind of weight moved."),
                picture(
                    "heatmap",
                    plots.heatmaps(report),
                    "Relative update norm; “outside” holds embedding, final norm and head.",
                ),
            ],
        ),
        Section(
            "Concentration and rank",
            [
                "Stable rank ‖Δ‖²/σ₁² counts the directions an update uses. σ₁ comes from up to "
                "eight steps of Lanczos bidiagonalisation from a random start (full SVD for small "
                "matrices); the vertical bars show how far its error bound could lower the rank."
            ],
            [
                picture("concentration", plots.curves(report), "Share of ‖Δ‖² in the top entries."),
                picture("stable_rank", plots.ranks(report), "Stable rank of each matrix' update."),
            ],
        ),
    ]
    if len(report["methods"]) > 1:
        cosine = report["cosine"]
        rows = [
            [label, *values]
            for label, values in zip(cosine["labels"], cosine["model"], strict=True)
        ]
        result.append(
            Section(
                "Agreement of the methods",
                ["Cosine of the whole updates: 1 = the same direction, 0 = unrelated."],
                [picture("cosine", plots.cosines(report), "By layer.")],
                [Table(("", *cosine["labels"]), rows)],
            )
        )
    if tokens := _token_tables(report):
        result.append(Section("Embedding and head rows by token", tables=tokens))
    columns = ("layer", "module", *_TENSOR_COLUMNS)
    tables = [
        Table(
            ("tensor", *columns),
            [[n, *(row[c] for c in columns)] for n, row in method["tensors"].items()],
            f"{label}: all {len(method['tensors'])} tensors",
            folded=True,
        )
        for label, method in report["methods"].items()
    ]
    result.append(Section("Every tensor", ["Click a column's head to sort."], tables=tables))
    return result


def write(directory: Path, drift: dict[str, Any] | None, retention: dict[str, Any] | None) -> None:
    """Write what is given, and the page of both: a half that is None is read from `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {"drift": drift, "retention": retention}
    for name, half in halves.items():
        file = directory / f"{name}.json"
        if half is not None:
            write_whole(file, json.dumps(half, indent=1, allow_nan=False))
        elif file.is_file():
            halves[name] = read_json_object(file)
    parts: list[Section] = []
    if (found := halves["drift"]) is not None:
        write_whole(directory / "drift.csv", to_csv(found))
        parts += sections(found)
    if (found := halves["retention"]) is not None:
        kept = retention_report.sections(found)
        # What was kept is the first thing a reader asks after the overview.
        parts[1:1] = kept if parts else []
        parts = parts or kept
    for part in parts:
        for picture in part.pictures:
            write_whole(directory / picture.name, picture.png)
    source = halves["drift"] or halves["retention"] or {}
    title = f"What fine-tuning did to {Path(str(source.get('base', 'the model'))).name}"
    tuned = ", ".join(f"{k} = {v}" for k, v in source.get("tuned", {}).items())
    subtitle = f"base {source.get('base', '')} · {tuned}"
    write_whole(directory / "report.html", render(title, subtitle, parts))
