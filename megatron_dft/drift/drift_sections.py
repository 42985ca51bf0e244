"""The drift half of a report's page: sections of conclusions, pictures and tables."""

from typing import Any

from megatron_dft.drift import columns, conclusions, plots, where_plots
from megatron_dft.drift.page import Picture, Section, Table

Report = dict[str, Any]


def _picture(name: str, png: bytes, caption: str) -> Picture:
    return Picture(f"{name}.png", png, caption)


def _overview(report: Report) -> Section:
    methods = report["methods"]
    rows = [[c, *(m["model"][c] for m in methods.values())] for c in columns.MODEL]
    return Section(
        "Overview",
        [
            "Δ = tuned − base. relative_norm is ‖Δ‖/‖base‖. Shares of weights left alone: "
            f"unchanged in the load dtype ({report['load_dtype']}), unchanged_bf16 in bfloat16, "
            "unchanged_1e-5 |Δ| ≤ 1e-5, unchanged_rel_1e-5 |Δ| ≤ 1e-5·|w₀|. near_zero is the share "
            f"of all weights below the {report['near_zero_quantile']:.0%} quantile of |w₀| in "
            "their tensor (or 0), changed_near_zero that share among the changed ones. "
            "top1pct_share is the share of ‖Δ‖² in the largest 1 % of entries; gini 0 means all "
            "weights moved alike, near 1 that few did (both exact to "
            f"{report['histogram_error']:.4f}).",
            *report.get("notes", ()),
        ],
        tables=[Table(("", *methods), rows)],
        meaning=conclusions.overview(report),
    )


def _layers(report: Report) -> Section:
    return Section(
        "Layers and modules",
        pictures=[
            _picture("layers", plots.layers(report), "Which depth moved, and how sparsely."),
            _picture("modules", plots.modules(report), "Which kind of weight moved."),
            _picture(
                "heatmap",
                plots.heatmaps(report),
                "Relative update norm; “outside” holds embedding, final norm and head.",
            ),
        ],
        meaning=conclusions.layers(report),
    )


def _principal_table(report: Report, ks: list[str]) -> Table:
    rows: list[list[Any]] = []
    for k in ks:
        for side in ("left", "right", "both"):
            cells = [columns.principal(m["model"], k, side) for m in report["methods"].values()]
            first = next(m["model"] for m in report["methods"].values() if m["model"]["principal"])
            rows.append([f"k = {k}, {side}", *cells, columns.principal(first, k, f"{side}_chance")])
    worst = max(
        columns.principal(m["model"], ks[-1], "residual") or 0.0 for m in report["methods"].values()
    )
    caption = (
        f"The directions are exact for a base within {worst:.2g} σ₁ of the real one (mean over the "
        "matrices, largest k). By chance: a random update of the first method's matrices."
    )
    return Table(("share of ‖Δ‖²", *report["methods"], "by chance"), rows, caption)


def _where(report: Report) -> Section:
    ks = columns.principal_ks(report)
    pictures, tables = [], []
    if ks:
        caption = "Shares of ‖Δ‖² in the base's k leading singular directions, all matrices."
        pictures.append(_picture("principal", where_plots.principal(report), caption))
        caption = "Above the dotted line: on the principal directions; below: off them."
        pictures.append(_picture("principal_places", where_plots.where_modules(report), caption))
        tables.append(_principal_table(report, ks))
    caption = "Dotted: the share that weights near zero have among all weights."
    pictures.append(_picture("near_zero", where_plots.near_zero(report), caption))
    return Section(
        "Where in the base",
        [
            "U_k and V_k are the k leading left and right singular directions of each base matrix "
            "W₀ = UΣVᵀ. RL was seen to work off them and on weights near zero, SFT on them (arXiv "
            "2511.08567; on-policy distillation: 2606.13657)."
        ],
        pictures,
        tables,
        meaning=conclusions.where(report),
    )


def _concentration(report: Report) -> Section:
    return Section(
        "Concentration and rank",
        [
            "Stable rank ‖Δ‖²/σ₁² counts the directions an update uses. σ₁ comes from up to "
            "eight steps of Lanczos bidiagonalisation from a random start (full SVD for small "
            "matrices); the vertical bars show how far its error bound could lower the rank."
        ],
        [
            _picture("concentration", plots.curves(report), "Share of ‖Δ‖² in the top entries."),
            _picture("stable_rank", plots.ranks(report), "Stable rank of each matrix' update."),
        ],
        meaning=conclusions.concentration(report),
    )


def _agreement(report: Report) -> Section:
    return Section(
        "Agreement of the methods",
        [
            "Cosine: 1 = the same direction, 0 = unrelated. Jaccard index: of the weights that "
            "either method changed, the share that both changed (drift.json also has what "
            "independent supports of these sizes would have)."
        ],
        [
            _picture("agreement", where_plots.agreement(report), "The whole updates."),
            *(
                _picture(f"agreement_{level}", where_plots.agreement_by(report, level), caption)
                for level, caption in (
                    ("layers", "Each pair of methods, layer by layer."),
                    ("modules", "Each pair of methods, by kind of weight."),
                )
            ),
        ],
        meaning=conclusions.agreement(report),
    )


def _token_tables(report: Report) -> list[Table]:
    tables: list[Table] = []
    for label, method in report["methods"].items():
        for name, rows in method["tokens"].items():
            caption = (
                f"{label} · {name}: {rows['changed_rows']:,} of {rows['rows']:,} rows changed, "
                f"median ‖Δ_row‖ {rows['median_norm']:.3g}; the most changed:"
            )
            body = [[t.get("text", ""), t["id"], t["norm"], t["relative"]] for t in rows["top"]]
            names = ("token", "id", "‖Δ_row‖", "relative")
            tables.append(Table(names, body, caption, folded=bool(tables)))
    return tables


def _tensor_tables(report: Report) -> list[Table]:
    ks = columns.principal_ks(report)
    shown = ("update_norm", "relative_norm", "unchanged", "changed_near_zero", "top1pct_share")
    names = ("tensor", *shown, "stable_rank", *(f"both subspaces, k = {k}" for k in ks))
    return [
        Table(
            names,
            [
                [
                    name,
                    *(row[c] for c in (*shown, "stable_rank")),
                    *(columns.principal(row, k, "both") for k in ks),
                ]
                for name, row in method["tensors"].items()
            ],
            f"{label}: all {len(method['tensors'])} tensors",
            folded=True,
        )
        for label, method in report["methods"].items()
    ]


def sections(report: Report) -> list[Section]:
    """The page's sections, pictures drawn."""
    result = [_overview(report), _layers(report), _where(report), _concentration(report)]
    if len(report["methods"]) > 1:
        result.append(_agreement(report))
    if tables := _token_tables(report):
        meaning = conclusions.tokens(report)
        result.append(Section("Embedding and head rows by token", tables=tables, meaning=meaning))
    note = "Click a column's head to sort; drift.csv has every figure."
    tables = _tensor_tables(report)
    result.append(
        Section("Every tensor", [note], tables=tables, meaning=conclusions.tensors(report))
    )
    return result
