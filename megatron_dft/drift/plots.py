"""The drift report's pictures, each PNG bytes, drawn from the report's numbers alone."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#1f5fa8", "#d1661a", "#2b8a4b", "#9a3fa0", "#b02a37", "#6b7280", "#0f8b8d", "#c29000")
_LONGEST = 60  # characters of a name
Report = dict[str, Any]


def figure(columns: int = 1, height: float = 3.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width and its axes, row by row, in the report's style."""
    picture = Figure(figsize=(10.6, height), layout="constrained")
    axes = [picture.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.grid(True, color="#e6eaef", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return picture, axes


def png(picture: Figure) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plain(text: str) -> str:
    """A name from outside as matplotlib shows it: one line, no formula, never left out.

    A legend drops what begins with an underscore.
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _number_layers(*axes: Axes) -> None:
    """Whole numbers below the axis: there is no layer 0.25."""
    for ax in axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _layers(method: Report) -> list[str]:
    return [k for k in method["layers"] if k.isdecimal()]


def layers(report: Report) -> bytes:
    """Relative update norm and share unchanged at bfloat16, layer by layer."""
    picture, (left, right) = figure(2)
    for i, (label, method) in enumerate(report["methods"].items()):
        keys = _layers(method)
        for ax, field in ((left, "relative_norm"), (right, "unchanged_bf16")):
            values = [method["layers"][k][field] for k in keys]
            ax.plot([int(k) for k in keys], values, "o-", ms=4, color=colour(i), label=plain(label))
    left.set(title="Relative update norm ‖Δ‖/‖θ₀‖")
    norms = [
        row["relative_norm"] for m in report["methods"].values() for row in m["layers"].values()
    ]
    moved = [n for n in norms if n]
    # Methods an order of magnitude apart need a logarithm; otherwise zero shows the proportions.
    if moved and max(moved) > 10 * min(moved):
        left.set(yscale="log")
    else:
        left.set_ylim(bottom=0)
    right.set(title="Share of weights unchanged in bfloat16", ylim=(-0.02, 1.02))
    _number_layers(left, right)
    left.legend(frameon=False)
    return png(picture)


def modules(report: Report) -> bytes:
    """Relative update norm and concentration, by module type."""
    picture, (left, right) = figure(2)
    count = len(report["methods"])
    for i, (label, method) in enumerate(report["methods"].items()):
        names = list(method["modules"])
        places = [x + (i - (count - 1) / 2) * 0.8 / count for x in range(len(names))]
        for ax, field in ((left, "relative_norm"), (right, "top1pct_share")):
            values = [method["modules"][m][field] or 0.0 for m in names]
            ax.bar(places, values, 0.8 / count, color=colour(i), label=plain(label))
            ax.set_xticks(range(len(names)), [plain(n) for n in names], rotation=40, ha="right")
    left.set(title="Relative update norm ‖Δ‖/‖θ₀‖")
    right.set(title="Share of ‖Δ‖² in the largest 1 % of entries", ylim=(0, 1.02))
    left.legend(frameon=False)
    return png(picture)


def heatmaps(report: Report) -> bytes:
    """Relative update norm of each layer and module type; one panel a method, one scale."""
    methods = report["methods"]
    first = next(iter(methods.values()))["heatmap"]
    columns = min(len(methods), 2)
    rows = -(-len(methods) // columns)
    height = max(3.2, 1.4 + 0.19 * len(first["layers"])) * rows
    picture, axes = figure(columns, height, rows)
    cells = [v for m in methods.values() for r in m["heatmap"]["relative_norm"] for v in r if v]
    top = max(cells, default=1.0)
    for ax, (label, method) in zip(axes, methods.items(), strict=False):
        heat = method["heatmap"]
        data = [[float("nan") if v is None else v for v in row] for row in heat["relative_norm"]]
        image = ax.imshow(data, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        kinds = [plain(name) for name in heat["modules"]]
        ax.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
        step = max(1, len(heat["layers"]) // 16)
        shown = [i for i, k in enumerate(heat["layers"]) if not k.isdecimal() or i % step == 0]
        ax.set_yticks(shown, [plain(heat["layers"][i]) for i in shown])
        ax.grid(False)
        ax.set(title=plain(label), ylabel="layer")
        picture.colorbar(image, ax=ax, label="‖Δ‖/‖θ₀‖")
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    return png(picture)


def curves(report: Report) -> bytes:
    """How much of the update sits in how few weights."""
    picture, (ax,) = figure(1)
    shares = [100 * s for s in report["curve_shares"]]
    for i, (label, method) in enumerate(report["methods"].items()):
        if method["curve"]:
            ax.plot(shares, method["curve"], "o-", ms=4, color=colour(i), label=plain(label))
    ax.plot(shares, [s / 100 for s in shares], ":", color="#6b7280", label="all weights alike")
    ax.set(
        xscale="log",
        xlabel="largest … % of the weights' updates",
        ylabel="hold this share of ‖Δ‖²",
        ylim=(-0.02, 1.02),
    )
    ax.legend(frameon=False)
    return png(picture)


def ranks(report: Report) -> bytes:
    """Stable rank of every matrix' update; bars reach to what the error of σ₁ allows."""
    methods = report["methods"]
    picture, axes = figure(min(len(methods), 2), 3.8 * -(-len(methods) // 2), -(-len(methods) // 2))
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
            dot_colour = colour(kinds.index(row["module"]))
            place, rank = int(row["layer"]), row["stable_rank"]
            ax.plot([place, place], [low, rank], color=dot_colour, lw=0.8, alpha=0.5)
            ax.plot([place], [rank], "o", ms=4, color=dot_colour)
        ax.set(
            title=plain(label), ylabel="stable rank ‖Δ‖²/σ₁²", yscale="log" if is_wide else "linear"
        )
        if not is_wide:
            ax.set_ylim(0, 1.05 * max(found, default=1.0))
        _number_layers(ax)
    for i, kind in enumerate(kinds):
        axes[0].plot([], [], "o", ms=5, color=colour(i), label=plain(kind))
    if kinds:
        picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    return png(picture)


def cosines(report: Report) -> bytes:
    """Cosine between the methods' updates, layer by layer."""
    picture, (ax,) = figure(1)
    cosine = report["cosine"]
    keys = [k for k in cosine["layers"] if k.isdecimal()]
    pairs = [(i, j) for i in range(len(cosine["labels"])) for j in range(i)]
    for number, (i, j) in enumerate(pairs):
        values = [cosine["layers"][k][i][j] for k in keys]
        ax.plot(
            [int(k) for k in keys],
            [float("nan") if v is None else v for v in values],
            "o-",
            ms=4,
            color=colour(number),
            label=plain(f"{cosine['labels'][j]} · {cosine['labels'][i]}"),
        )
    ax.axhline(0, color="#6b7280", lw=0.8)
    ax.set(title="Cosine between updates", ylim=(-1.05, 1.05))
    _number_layers(ax)
    # Ten pairs of five methods would hide the lines.
    picture.legend(frameon=False, loc="outside right upper", fontsize=8)
    return png(picture)
