"""The pictures of a comparison of runs, each PNG bytes: over the steps, and over the rates."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from megatron_dft.drift import style
from megatron_dft.drift.run_figures import (
    ACCURACY,
    CROSS_ENTROPY,
    GRAD_NORM,
    HELD_OUT,
    PROB,
    RATE,
    held_out,
    last,
)
from megatron_dft.drift.run_log import Run, Series

_MARKS = 8  # on a line
_FEW = 25  # points of a line that are all shown


def _smooth(series: Series) -> tuple[list[int], list[float]]:
    """Steps, and the mean of the last fiftieth of the run up to each."""
    steps = sorted(series)
    window = max(1, len(steps) // 50)
    values = [series[s] for s in steps]
    return steps, [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(steps))
    ]


def _curves(ax: Axes, runs: Sequence[Run], of: Callable[[Run], Series], title: str) -> None:
    for i, run in enumerate(runs):
        steps, values = _smooth(of(run))
        apart = max(1, len(steps) // _MARKS)
        # Lines that lie on one another show their marks at other steps.
        first = i * apart // max(len(runs), 1) if len(steps) > _FEW else 0
        every = (first, apart) if len(steps) > _FEW else 1
        ax.plot(steps, values, label=style.plain(run.label), markevery=every, **style.line(i))
    ax.set(title=title, xlabel="step")


def _pair(runs: Sequence[Run], left: tuple, right: tuple, log: bool = False) -> bytes:
    picture, axes = style.figure(2, 4.4)
    for ax, (of, title) in zip(axes, (left, right), strict=True):
        _curves(ax, runs, of, title)
    if log:
        axes[0].set(yscale="log")
    style.legend(picture, axes[0])
    return style.png(picture)


def _series(tag: str) -> Callable[[Run], Series]:
    return lambda run: run.figures.get(tag, {})


def cross_entropy(runs: Sequence[Run]) -> bytes:
    """In training and on held-out data."""
    return _pair(
        runs,
        (_series(CROSS_ENTROPY), "Cross entropy in training, nats a token"),
        (_series(CROSS_ENTROPY + HELD_OUT), "On held-out data, nats a token"),
    )


def confidence(runs: Sequence[Run]) -> bytes:
    """Mean probability of the targets, and accuracy."""
    return _pair(
        runs,
        (lambda run: held_out(run, PROB)[1], "Mean probability of the target tokens"),
        (lambda run: held_out(run, ACCURACY)[1], "Token accuracy"),
    )


def optimizer(runs: Sequence[Run]) -> bytes:
    """Gradient norm and learning rate."""
    positive = any(v > 0 for run in runs for v in run.figures.get(GRAD_NORM, {}).values())
    return _pair(
        runs,
        (_series(GRAD_NORM), "Norm of the gradient"),
        (_series(RATE), "Learning rate"),
        log=positive,
    )


def by_rate(groups: dict[str, list[tuple[float, Run]]]) -> bytes:
    """Where each run ended over its learning rate; one line a group of runs alike but for it."""
    picture, axes = style.figure(2, 4.4)
    panels = (
        (CROSS_ENTROPY, "Cross entropy at the end, nats a token"),
        (ACCURACY, "Token accuracy at the end"),
    )
    for ax, (tag, title) in zip(axes, panels, strict=True):
        for i, (name, members) in enumerate(groups.items()):
            points = [(rate, last(held_out(run, tag)[1])) for rate, run in members]
            known = [(rate, value) for rate, value in points if value is not None]
            ax.plot(*zip(*known, strict=True), label=style.plain(name), **style.line(i))
        rates = sorted({rate for members in groups.values() for rate, _ in members})
        ax.set(title=title, xlabel="learning rate", xscale="log")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=40, ha="right")
        ax.set_xticks([], minor=True)
    style.legend(picture, axes[0])
    return style.png(picture)
