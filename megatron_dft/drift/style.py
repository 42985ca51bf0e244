"""How every picture of a report looks: its axes, and lines that need no colour to be told apart."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = (
    "#1f5fa8", "#d1661a", "#2b8a4b", "#9a3fa0", "#b02a37", "#6b7280", "#0f8b8d", "#c29000",
    "#3b3f8f", "#e0709a", "#7a4a21", "#6f8f1a",
)  # fmt: skip
INK, SOFT = "#1c2430", "#6b7280"
_LONGEST = 60  # characters of a name
_MARKERS = "os^DvPX*<>"
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2)),
)
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "---", "|||", "**", "/.", "O-", "\\|")


def figure(columns: int = 1, height: float = 3.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width and its axes, row by row, in the report's style."""
    picture = Figure(figsize=(10.4, height), layout="constrained")
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


def line(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the index-th line; no two of the first 70 share the last two."""
    return {
        "color": colour(index),
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.3,
    }


def point(index: int) -> dict[str, Any]:
    """`line` without the line."""
    return line(index) | {"linestyle": "none", "markersize": 6}


def bar(index: int) -> dict[str, Any]:
    """Colour and hatching of the index-th bar; no two of the first 13 share the hatching."""
    hatch = _HATCHES[index % len(_HATCHES)]
    return {"color": colour(index), "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}


def legend(picture: Figure, ax: Axes) -> None:
    """One legend below all panels: inside it would hide lines where there are many methods."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        columns = max(1, min(len(labels), 110 // (6 + max(map(len, labels)))))
        picture.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )


def number_layers(*axes: Axes) -> None:
    """Whole numbers below the axis: there is no layer 0.25."""
    for ax in axes:
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def from_zero(ax: Axes) -> None:
    """The axis from 0 on, with room above the highest mark even where all are alike."""
    ax.axhline(0, linewidth=0)
    ax.autoscale_view(scalex=False)
    ax.set_ylim(bottom=0)


def names(ax: Axes, labels: Sequence[str]) -> None:
    """Names below the axis, slanted so that none is cut."""
    shown = [plain(label) for label in labels]
    ax.set_xticks(range(len(shown)), shown, rotation=40, ha="right", rotation_mode="anchor")


def heat(
    picture: Figure,
    ax: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    limits: tuple[float, float],
    meaning: str,
    written: bool = False,
    log: bool = False,
) -> None:
    """A table of colours from dark to light, `meaning` what they stand for; `written`: each cell
    has its figure in it."""
    data = [[float("nan") if v is None else v for v in row] for row in cells]
    norm = LogNorm(*limits) if log else Normalize(*limits)
    image = ax.imshow(data, aspect="auto", cmap="cividis", norm=norm)
    ax.grid(False)
    names(ax, columns)
    step = max(1, len(rows) // 40)
    shown = [plain(row) for row in rows[::step]]
    ax.set_yticks(range(0, len(rows), step), shown, fontsize=8)
    middle = sum(limits) / 2
    for i, row in enumerate(cells if written else ()):
        for j, value in enumerate(row):
            if value is not None:
                ink = "white" if value < middle else "black"
                ax.text(j, i, _figure(value), ha="center", va="center", color=ink, fontsize=7)
    picture.colorbar(image, ax=ax, label=meaning, fraction=0.08, pad=0.02)


def _figure(value: float) -> str:
    """Two digits without the zero in front: cells are narrow where there are many columns."""
    text = f"{value:.2f}".replace("0.", ".", 1)
    return ".00" if text == "-.00" else text
