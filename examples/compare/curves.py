"""The comparison's one picture: every method's curve of models, from the base on."""

import io
import statistics
from typing import Any

_PANELS = (
    ("relative_norm", "Drift ‖Δ‖/‖θ₀‖", 0.0),
    ("kl_task", "KL to the base, task", 0.0),
    ("kl", "KL to the base, general text", 0.0),
)
_COLOURS = (
    "#1f5fa8", "#d1661a", "#2b8a4b", "#9a3fa0", "#c29000", "#6b7280", "#b3261e", "#0b8a8a",
    "#444b9a",
)  # fmt: skip


def draw(found: dict[str, Any]) -> bytes:
    """PNG bytes: greedy accuracy against each figure; a line is the mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    for ax, (field, title, start) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for colour, (name, by_seed) in zip(_COLOURS, found["curves"].items(), strict=False):
            steps = list(zip(*by_seed, strict=True))
            x = [start, *(statistics.fmean(c[field] for c in cells) for cells in steps)]
            y = [statistics.fmean(c["greedy"] for c in cells) for cells in steps]
            y.insert(0, found["base"]["greedy"])
            ax.plot(x, y, "o-", color=colour, label=name, ms=4, lw=1.5)
        ax.axhline(found["matched_score"], color="#9aa3ad", lw=0.8, ls="--")
        ax.set_xlabel(title)
        ax.set_ylabel("accuracy, greedy")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e6eaef")
        ax.set_axisbelow(True)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
