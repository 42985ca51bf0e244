"""The comparison's one picture: every method's curve of models, from the base on."""

import statistics
from typing import Any

from megatron_dft.drift import style

_PANELS = (
    ("relative_norm", "Score and drift", "‖Δ‖/‖θ₀‖"),
    ("kl_task", "Score and task KL", "KL(base ‖ tuned), task"),
    ("kl", "Score and general KL", "KL(base ‖ tuned), general text"),
)


def draw(found: dict[str, Any]) -> bytes:
    """PNG bytes: greedy accuracy against each figure; a line is the mean over the seeds."""
    picture, axes = style.figure(len(_PANELS), 4.4)
    for ax, (field, title, name) in zip(axes, _PANELS, strict=True):
        for i, (method, by_seed) in enumerate(found["curves"].items()):
            steps = list(zip(*by_seed, strict=True))
            x = [0.0, *(statistics.fmean(c[field] for c in cells) for cells in steps)]
            y = [statistics.fmean(c["greedy"] for c in cells) for cells in steps]
            y.insert(0, found["base"]["greedy"])
            ax.plot(x, y, label=method, **style.line(i))
        ax.axhline(found["matched_score"], color=style.SOFT, lw=0.8, ls="--", label="matched score")
        ax.set(title=title, xlabel=name)
    axes[0].set_ylabel("accuracy, greedy")
    style.legend(picture, axes[0])
    return style.png(picture)
