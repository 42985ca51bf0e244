"""The drift report's pictures of size and spread, each PNG bytes, drawn from its numbers alone."""

from typing import Any

from matplotlib.axes import Axes

from megatron_dft.drift import style

Report = dict[str, Any]


def layer_keys(report: Report) -> list[str]:
    """The numbered layers, as the report's keys."""
    first = next(iter(report["methods"].values()))
    return [k for k in first["layers"] if k.isdecimal()]


def by_layer(ax: Axes, report: Report, field: str) -> None:
    """One line a method."""
    for i, (label, method) in enumerate(report["methods"].items()):
        keys = [k for k in method["layers"] if k.isdecimal()]
        values = [method["layers"][k][field] for k in keys]
        shown = [float("nan") if v is None else v for v in values]
        ax.plot([int(k) for k in keys], shown, label=style.plain(label), **style.line(i))
    style.number_layers(ax)


def by_module(ax: Axes, report: Report, value: Any) -> None:
    """One mark a method and module type; `value`: a row of the report → its figure or None."""
    count = len(report["methods"])
    names: list[str] = []
    for i, (label, method) in enumerate(report["methods"].items()):
        names = list(method["modules"])
        places = [x + (i - (count - 1) / 2) * 0.8 / count for x in range(len(names))]
        found = [value(method["modules"][m]) for m in names]
        shown = [float("nan") if v is None else v for v in found]
        ax.plot(places, shown, label=style.plain(label), **style.point(i))
    for x in range(1, len(names)):
        ax.axvline(x - 0.5, color="#e6eaef", lw=0.8)
    ax.grid(False, axis="x")
    style.names(ax, names)


def layers(report: Report) -> bytes:
    """Relative update norm and share unchanged, layer by layer."""
    picture, (left, right) = style.figure(2, 4.2)
    by_layer(left, report, "relative_norm")
    by_layer(right, report, "unchanged")
    left.set(title="Relative update norm ‖Δ‖/‖θ₀‖")
    norms = [
        row["relative_norm"] for m in report["methods"].values() for row in m["layers"].values()
    ]
    moved = [n for n in norms if n]
    # Methods an order of magnitude apart need a logarithm; otherwise zero shows the proportions.
    if moved and max(moved) > 10 * min(moved):
        left.set(yscale="log")
    else:
        style.from_zero(left)
    right.set(title="Share of weights unchanged (load dtype)", ylim=(-0.02, 1.02))
    style.legend(picture, left)
    return style.png(picture)


def modules(report: Report) -> bytes:
    """Relative update norm and concentration, by module type."""
    picture, (left, right) = style.figure(2, 4.4)
    by_module(left, report, lambda row: row["relative_norm"])
    by_module(right, report, lambda row: row["unchanged"])
    left.set(title="Relative update norm ‖Δ‖/‖θ₀‖")
    style.from_zero(left)
    right.set(title="Share of weights unchanged (load dtype)", ylim=(-0.02, 1.02))
    style.legend(picture, left)
    return style.png(picture)


def heatmaps(report: Report) -> bytes:
    """Relative update norm of each layer and module type; one panel a method, one scale."""
    methods = report["methods"]
    first = next(iter(methods.values()))["heatmap"]
    columns = min(len(methods), 2)
    rows = -(-len(methods) // columns)
    height = min(max(2.6, 1.2 + 0.16 * len(first["layers"])), 5.0) * rows
    picture, axes = style.figure(columns, height, rows)
    cells = [v for m in methods.values() for r in m["heatmap"]["relative_norm"] for v in r if v]
    low, top = min(cells, default=1.0), max(cells, default=1.0)
    is_wide = top > 10 * low  # one linear scale would show the smaller methods all dark
    for ax, (label, method) in zip(axes, methods.items(), strict=False):
        found = method["heatmap"]
        style.heat(
            picture,
            ax,
            found["layers"],
            found["modules"],
            found["relative_norm"],
            (low if is_wide else 0, top),
            meaning="‖Δ‖/‖θ₀‖",
            log=is_wide,
        )
        ax.set(title=style.plain(label), ylabel="layer")
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    return style.png(picture)


def curves(report: Report) -> bytes:
    """How much of the update sits in how few weights."""
    picture, (ax,) = style.figure(1, 4.2)
    shares = [100 * s for s in report["curve_shares"]]
    for i, (label, method) in enumerate(report["methods"].items()):
        if method["curve"]:
            ax.plot(shares, method["curve"], label=style.plain(label), **style.line(i))
    ax.plot(shares, [s / 100 for s in shares], ":", color=style.SOFT, label="all weights alike")
    ax.set(
        xscale="log",
        xlabel="largest … % of the weights' updates",
        ylabel="hold this share of ‖Δ‖²",
        ylim=(-0.02, 1.02),
    )
    style.legend(picture, ax)
    return style.png(picture)


def ranks(report: Report) -> bytes:
    """Stable rank of every matrix' update; bars reach to what the error of σ₁ allows."""
    methods = report["methods"]
    rows = -(-len(methods) // 2)
    picture, axes = style.figure(min(len(methods), 2), 3.4 * rows + 0.6, rows)
    kinds: list[str] = []
    found = [
        row["stable_rank"]
        for method in methods.values()
        for row in method["tensors"].values()
        if row["stable_rank"]
    ]
    is_wide = bool(found) and max(found) > 10 * min(found)
    for ax, (label, method) in zip(axes, methods.items(), strict=False):
        for row in method["tensors"].values():
            if row["stable_rank"] is None or not row["layer"].isdecimal():
                continue
            if row["module"] not in kinds:
                kinds.append(row["module"])
            low = row["update_norm"] ** 2 / (row["sigma1"] + row["sigma1_error"]) ** 2
            look = style.point(kinds.index(row["module"])) | {"markersize": 5}
            # The kinds of one layer stand side by side.
            place = int(row["layer"]) + 0.08 * (kinds.index(row["module"]) % 7 - 3)
            rank = row["stable_rank"]
            ax.plot([place, place], [low, rank], color=look["color"], lw=0.8, alpha=0.5)
            ax.plot([place], [rank], **look)
        ax.set(
            title=style.plain(label),
            ylabel="stable rank ‖Δ‖²/σ₁²",
            yscale="log" if is_wide else "linear",
        )
        if is_wide:
            ax.yaxis.set_minor_formatter("")
        highest = 1.1 * max(found, default=1.0)
        ax.set_ylim(0.9 if is_wide else 0, highest)
        style.number_layers(ax)
    for i, kind in enumerate(kinds):
        axes[0].plot([], [], label=style.plain(kind), **style.point(i))
    style.legend(picture, axes[0])
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    return style.png(picture)
