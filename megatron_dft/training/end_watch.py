"""Does the model learn to end its turns? The known complaint about DFT, told before anyone asks."""

import math
from collections import deque
from typing import Any

from megatron_dft.losses.report import END_PROB

STEPS = 20
# Below it another token may be likelier than the end, and greedy generation goes on.
UNLIKELY = 0.5


class EndWatch:
    """Keeps the mean probability of end tokens over the last steps of training."""

    def __init__(self) -> None:
        self._recent: deque[Any] = deque(maxlen=STEPS)

    def log(self, losses: dict[str, Any]) -> None:
        """Take a step's figures; they stay where they are, no device is waited for."""
        if END_PROB in losses:
            self._recent.append(losses[END_PROB])

    def warning(self, loss: str, full_weight: str) -> str | None:
        """What to say at the end of a run whose end tokens stayed unlikely; else None."""
        # A step without an end token has a mean of 0 / 0.
        found = [p for p in map(float, self._recent) if not math.isnan(p)]
        if not found or (mean := sum(found) / len(found)) >= UNLIKELY:
            return None
        said = (
            f"the tokens that end an answer have a mean probability of {mean:.3f} in the last "
            f"{len(found)} steps: the model will often not stop by itself; "
        )
        if loss == "sft" or full_weight != "none":
            return said + "train longer, or raise --lr"
        return said + (
            f"--loss {loss} gives an unlikely end a small weight: train with --dft-full-weight end"
        )
