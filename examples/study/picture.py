"""The study's one picture: methods side by side, a dot for each seed."""

import io
from typing import Any

_PANELS = (
    ("greedy", "Accuracy, greedy"),
    ("sampled", "Accuracy, sampled"),
    ("relative_norm", "Drift ‖Δ‖/‖θ₀‖"),
    ("kl", "KL to the base, general text"),
    ("old_facts", "Old facts kept"),
)
_COLOURS = ("#6b7280", "#1f5fa8", "#d1661a", "#2b8a4b", "#9a3fa0", "#c29000")


def draw(tables: dict[str, Any], titles: dict[str, str]) -> bytes:
    """PNG bytes; a row of panels for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.7 * len(tables)), layout="constrained")
    parts = figure.subfigures(len(tables), 1, squeeze=False)[:, 0]
    for part, (task, methods) in zip(parts, tables.items(), strict=True):
        part.suptitle(titles[task], fontsize=13, fontweight="bold")
        names = ["base", *(m for m in methods if m != "base")]
        for ax, (field, title) in zip(part.subplots(1, len(_PANELS)), _PANELS, strict=True):
            for x, name in enumerate(names):
                values = methods[name][field]["values"]
                ax.bar(x, methods[name][field]["mean"], 0.7, color=_COLOURS[x % len(_COLOURS)])
                ax.plot([x] * len(values), values, "o", color="black", ms=3.5, alpha=0.7)
            ax.set_xticks(range(len(names)), names, rotation=35, ha="right")
            ax.set_title(title, fontsize=11)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(True, axis="y", color="#e6eaef")
            ax.set_axisbelow(True)
            if field in ("greedy", "sampled", "old_facts"):
                ax.set_ylim(0, 1.03)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
