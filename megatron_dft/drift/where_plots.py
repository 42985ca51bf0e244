"""The drift report's pictures of place: principal subspaces, near-zero weights, agreement."""

from megatron_dft.drift import columns, style
from megatron_dft.drift.plots import Report, by_layer, by_module, layer_keys

_SIDES = (("left", "left: ‖U_kᵀΔ‖²"), ("right", "right: ‖ΔV_k‖²"), ("both", "both: ‖U_kᵀΔV_k‖²"))


def principal(report: Report) -> bytes:
    """Shares of ‖Δ‖² in the k leading directions of the base, and what a random Δ would have."""
    ks = columns.principal_ks(report)
    picture, axes = style.figure(3, 4.0)
    lowest = 1.0
    for ax, (side, title) in zip(axes, _SIDES, strict=True):
        expected: list[float] = []
        for i, (label, method) in enumerate(report["methods"].items()):
            row = method["model"]
            if row["principal"] is None:
                continue
            values = [row["principal"]["k"][k][side] for k in ks]
            expected = expected or [row["principal"]["k"][k][f"{side}_chance"] for k in ks]
            lowest = min([lowest, *(v for v in values + expected if v)])
            ax.plot([int(k) for k in ks], values, label=style.plain(label), **style.line(i))
        if expected:
            shown = [int(k) for k in ks]
            ax.plot(shown, expected, ":", color=style.INK, lw=2, label="a random update")
        ax.set(title=title, xlabel="k", xscale="log", yscale="log")
        ax.set_xticks([int(k) for k in ks], ks)
        ax.minorticks_off()
    for ax in axes:
        ax.set_ylim(lowest / 2, 1.5)
    axes[0].set_ylabel("share of ‖Δ‖²")
    style.legend(picture, axes[0])
    return style.png(picture)


def near_zero(report: Report) -> bytes:
    """Share of the changed weights that were near zero in the base: by layer, by module type."""
    picture, (left, right) = style.figure(2, 4.4)
    by_layer(left, report, "changed_near_zero")
    by_module(right, report, lambda row: row["changed_near_zero"])
    base = next(iter(report["methods"].values()))["model"]["near_zero"]
    for ax in (left, right):
        ax.axhline(base, ls=":", lw=2, color=style.INK, label="of all weights")
        style.from_zero(ax)
    left.set(title="Changed weights near zero before: by layer")
    right.set(title="Changed weights near zero before: by module")
    style.legend(picture, left)
    return style.png(picture)


def where_modules(report: Report) -> bytes:
    """Share of ‖Δ‖² inside both principal subspaces over chance, by layer and module type."""
    ks = columns.principal_ks(report)
    k = ks[len(ks) // 2]

    def over_chance(row: Report) -> float | None:
        share, expected = (columns.principal(row, k, s) for s in ("both", "both_chance"))
        return share / expected if share and expected else None

    picture, (left, right) = style.figure(2, 4.4)
    for i, (label, method) in enumerate(report["methods"].items()):
        keys = [key for key in method["layers"] if key.isdecimal()]
        found = [over_chance(method["layers"][key]) for key in keys]
        shown = [float("nan") if v is None else v for v in found]
        left.plot([int(key) for key in keys], shown, label=style.plain(label), **style.line(i))
    style.number_layers(left)
    by_module(right, report, over_chance)
    for ax in (left, right):
        ax.axhline(1, ls=":", lw=2, color=style.INK, label="a random update")
        ax.set(yscale="log")
    left.set(title=f"Inside both, k = {k}, over chance: by layer")
    right.set(title=f"Inside both, k = {k}, over chance: by module")
    style.legend(picture, left)
    return style.png(picture)


def agreement(report: Report) -> bytes:
    """Cosine and Jaccard index of the whole updates: every method with every other."""
    labels = report["agreement"]["labels"]
    picture, axes = style.figure(2, 1.8 + 0.42 * len(labels))
    panels = (("cosine", "Cosine of the updates", -1), ("jaccard", "Jaccard index of supports", 0))
    for ax, (field, title, low) in zip(axes, panels, strict=True):
        cells = report["agreement"]["model"][field]
        style.heat(picture, ax, labels, labels, cells, (low, 1), field, written=True)
        ax.set(title=title)
    return style.png(picture)


def agreement_by(report: Report, level: str) -> bytes:
    """Cosine and Jaccard index of each pair of methods; `level`: layers or modules."""
    found = report["agreement"]
    labels, size = found["labels"], len(found["labels"])
    pairs = [(i, j) for i in range(size) for j in range(i)]
    keys = layer_keys(report) if level == "layers" else list(found[level])
    picture, axes = style.figure(2, 1.8 + 0.2 * len(pairs))
    for ax, (field, low) in zip(axes, (("cosine", -1), ("jaccard", 0)), strict=True):
        cells = [[found[level][key][field][i][j] for key in keys] for i, j in pairs]
        rows = [f"{labels[j]} · {labels[i]}" for i, j in pairs]
        style.heat(picture, ax, rows, keys, cells, (low, 1), field, written=len(keys) <= 12)
        ax.set(title=f"{field.capitalize()}, by {level[:-1]}", xlabel=level[:-1])
        if level == "layers" and len(keys) > 12:
            step = -(-len(keys) // 12)
            ax.set_xticks(range(0, len(keys), step), keys[::step], rotation=0)
    return style.png(picture)
