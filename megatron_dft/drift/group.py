"""What some tensors have together: a layer, a kind of module, the whole model."""

import math
from typing import Any

import numpy as np

from megatron_dft.drift import support
from megatron_dft.drift.compare import TensorDrift
from megatron_dft.drift.moments import Moments
from megatron_dft.drift.principal import Shares, chance

_SHARES = ("left", "right", "both", "residual", "left_chance", "right_chance", "both_chance")


class _Principal:
    """`Shares` of matrices, each weighted by its ‖Δ‖²; beside them what a random Δ would have."""

    def __init__(self) -> None:
        self._energy = 0.0
        self._sums: dict[int, np.ndarray] = {}

    def add(self, by_k: dict[int, Shares], shape: tuple[int, ...], energy: float) -> None:
        self._energy += energy
        for k, found in by_k.items():
            values = (found.left, found.right, found.both, found.residual, *chance(shape, k))
            self._sums[k] = self._sums.get(k, 0.0) + energy * np.array(values)

    def report(self, energy: float) -> dict[str, Any] | None:
        """k → shares, and `measured`: the part of `energy` that lies in measured matrices."""
        if not self._energy:
            return None
        rows: dict[str, Any] = {
            str(k): dict(zip(_SHARES, (sums / self._energy).tolist(), strict=True))
            for k, sums in self._sums.items()
        }
        return {"measured": min(self._energy / energy, 1.0), "k": rows}


class Group:
    """Sums over some tensors, for all methods."""

    def __init__(self, methods: int):
        self.moments = [Moments() for _ in range(methods)]
        self.principal = [_Principal() for _ in range(methods)]
        self.dots = np.zeros((methods, methods))
        self.both_changed = np.zeros((methods, methods), dtype=np.int64)

    def add(self, tensor: TensorDrift) -> None:
        for i, (mine, theirs) in enumerate(zip(self.moments, tensor.moments, strict=True)):
            mine.merge(theirs)
            if (by_k := tensor.principal[i]) is not None:
                self.principal[i].add(by_k, tensor.shape, theirs.delta_sq)
        self.dots += tensor.dots
        self.both_changed += tensor.both_changed

    def statistics(self, method: int) -> dict[str, Any]:
        """A report's row: moments, and `principal` (None where no matrix was measured)."""
        moments = self.moments[method]
        shares = self.principal[method].report(moments.delta_sq)
        return moments.statistics() | {"principal": shares}

    def pairs(self) -> dict[str, Any]:
        """Matrices [M][M] of the methods' agreement."""
        return {
            "cosine": cosine(self.dots),
            "jaccard": support.jaccard(self.both_changed),
            "jaccard_by_chance": support.jaccard_by_chance(
                self.both_changed, self.moments[0].count
            ),
        }


def cosine(dots: np.ndarray) -> list[list[float | None]]:
    """Cosines [M][M] from summed dot products; None where an update is zero."""
    size = len(dots)
    norms = [math.sqrt(float(dots[i, i])) for i in range(size)]
    return [
        [
            float(dots[i, j]) / (norms[i] * norms[j]) if norms[i] and norms[j] else None
            for j in range(size)
        ]
        for i in range(size)
    ]
