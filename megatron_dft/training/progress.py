"""One line a step that a person can read: rich on a terminal, else plain."""

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_dft.losses.report import (
    CROSS_ENTROPY,
    END_PROB,
    HISTOGRAM_BINS,
    SOURCE,
    TOKENS,
    histogram_key,
)
from megatron_dft.storage import terminal

_SHORT = {
    "dft/mean-prob": "p",
    "dft/mean-weight": "weight",
    "dft/token-accuracy": "accuracy",
    END_PROB: "end p",
}
# Items of the data whose losses a step's line has room for; TensorBoard has all.
_ITEMS = 4
_BARS = " ▁▂▃▄▅▆▇█"


def sparkline(shares: list[float]) -> str:
    """Ten characters for the histogram of target probability, p = 0 left and p = 1 right."""
    highest = max(shares, default=0.0)
    if highest <= 0:
        return _BARS[0] * len(shares)
    return "".join(_BARS[round(share / highest * (len(_BARS) - 1))] for share in shares)


def short_figures(figures: dict[str, float]) -> list[str]:
    """The figures between 0 and 1 that are there, each with a short name."""
    return [f"{short} {figures[name]:.3f}" for name, short in _SHORT.items() if name in figures]


def of_items(figures: dict[str, float]) -> list[str]:
    """The cross entropy of each item of the data that had tokens, by the last part of its path."""
    items = [name for name in figures if name.startswith(SOURCE)]
    short = {name: Path(name.removeprefix(SOURCE)).name for name in items}
    if len(set(short.values())) < len(items):
        short = {name: name.removeprefix(SOURCE) for name in items}
    return [f"{short[n]} {figures[n]:.4f}" for n in items if not math.isnan(figures[n])]


def duration(seconds: float) -> str:
    """H:MM:SS, or M:SS below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Takes our figures out of Megatron's report and prints them.

    `log` is called ahead of each of Megatron's log calls, on every rank; only a rank of the last
    pipeline stage has figures, and only the last rank prints.

    Args:
        style: rich, plain or off (auto is resolved by the caller's `choose`).
        prints: whether this rank prints.
        micro_batches: micro-batches of one step over all replicas and context-parallel ranks.
        interval: steps between lines.
        writer: TensorBoard writer or None; gets the histogram (Megatron writes the scalars itself).
    """

    def __init__(
        self,
        style: str,
        prints: bool,
        micro_batches: int,
        steps: int,
        interval: int,
        writer: Any = None,
        console: Console | None = None,
    ) -> None:
        self.style, self.prints, self.steps, self.interval = style, prints, steps, interval
        self.micro_batches, self.writer = micro_batches, writer
        self.console = console or Console(
            file=terminal.out(), soft_wrap=True, highlight=False, force_terminal=style == "rich"
        )
        # The first line comes after the set-up: there is no step before it to time.
        self.mark: float | None = None
        self.tokens, self.done = 0.0, 0

    def log(self, losses: dict[str, Any], call: dict[str, Any]) -> None:
        """Print a line for this step; removes the histogram and the token count from `losses`."""
        keys = [histogram_key(i) for i in range(HISTOGRAM_BINS)]
        shares = [losses.pop(key) for key in keys if key in losses]
        if TOKENS in losses:
            # Summed where it is: reading it here would wait for the device in every step.
            self.tokens = self.tokens + losses.pop(TOKENS) * self.micro_batches
        if not losses:
            return
        self.done += 1
        step = call["iteration"]
        if self.writer is not None:
            for key, share in zip(keys, shares, strict=False):
                self.writer.add_scalar(key, float(share), step)
        if not self.prints or (step % self.interval and not call.get("is_first_iteration")):
            return
        now = time.monotonic()
        pace = []
        if self.mark is not None:
            elapsed = now - self.mark
            left = (self.steps - step) * elapsed / self.done
            pace = [
                f"{float(self.tokens) / elapsed:,.0f} trained tokens/s",
                f"{duration(left)} left",
            ]
        self.mark = now
        self.tokens, self.done = 0.0, 0
        figures = {name: float(value) for name, value in losses.items()}
        if self.style != "off":
            self._print(step, figures, [float(share) for share in shares], call, pace)

    def _print(
        self,
        step: int,
        figures: dict[str, float],
        histogram: list[float],
        call: dict[str, Any],
        pace: list[str],
    ) -> None:
        parts = [f"step {step}/{self.steps}", f"{CROSS_ENTROPY} {figures[CROSS_ENTROPY]:.4f}"]
        parts += [
            f"{name} {value:.4f}"
            for name, value in figures.items()
            if name.endswith(" loss") and name != CROSS_ENTROPY and not name.startswith(SOURCE)
        ]
        items = of_items(figures)
        parts += items[:_ITEMS] + [f"and {len(items) - _ITEMS} items"] * (len(items) > _ITEMS)
        parts += short_figures(figures)
        if call.get("grad_norm") is not None:
            parts.append(f"grad {float(call['grad_norm']):.3g}")
        if call.get("learning_rate") is not None:
            parts.append(f"lr {call['learning_rate']:.2g}")
        parts += pace
        text = " | ".join(parts) + f" | p 0▕{sparkline(histogram)}▏1"
        if self.style == "rich":
            self.console.print(Text(text, style="bold cyan"))
        else:
            terminal.say(text)


def choose(style: str) -> str:
    """auto → rich on a terminal, plain in a log."""
    return ("rich" if terminal.out().isatty() else "plain") if style == "auto" else style
