"""Hold a measured quantity (KL to the base, relative update norm) at a value by its coefficient."""

import math
from dataclasses import dataclass, field


@dataclass
class TargetController:
    """Raises the coefficient of an anchor while `measured` is above `target`, lowers it below.

    A proportional-integral controller on logarithms: with e = log(measured / target), clipped to
    ±1, log c changes by `gain`·e + `damping`·(e − e_previous). It is scale-free, so one gain serves
    a KL of 0.01 and a norm of 5, and the difference term stops it early: both quantities keep
    moving for many steps after the coefficient has changed. The coefficient stays within `range`
    times its starting value, so that the approach, during which nothing needs holding, cannot wind
    it down to nothing.

    Feed every rank the same (globally reduced) value, or their weights will part.
    """

    target: float
    coefficient: float
    gain: float = 0.1
    damping: float = 1.0
    range: float = 100.0
    _previous: float | None = field(default=None, repr=False)
    _start: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        for name in ("target", "coefficient"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"the target mode needs a {name} above 0, got {value}; it scales the "
                    "coefficient it starts from"
                )
        self._start = self._start or self.coefficient

    def update(self, measured: float) -> float:
        """The coefficient for the next step. `measured`: finite, ≥ 0."""
        ratio = max(measured / self.target, math.exp(-1.0))
        error = min(math.log(ratio), 1.0)
        change = self.gain * error
        if self._previous is not None:
            change += self.damping * (error - self._previous)
        self._previous = error
        wanted = self.coefficient * math.exp(change)
        self.coefficient = min(max(wanted, self._start / self.range), self._start * self.range)
        return self.coefficient

    def state_dict(self) -> dict[str, float | None]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {
            "coefficient": self.coefficient,
            "previous": self._previous,
            "start": self._start,
        }

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.coefficient = float(state["coefficient"] or self.coefficient)
        self._start = float(state["start"] or self.coefficient)
        previous = state["previous"]
        self._previous = None if previous is None else float(previous)
