"""How much of an update lies in the base's principal subspaces.

W₀ = U Σ Vᵀ. For each k the shares of ‖Δ‖_F² that are left by the projections on the k leading
directions: left ‖U_kᵀ Δ‖², right ‖Δ V_k‖², both ‖U_kᵀ Δ V_k‖². A random Δ has k/m, k/n and k²/(mn).
(Off-principal updates of RL: arXiv 2511.08567; of on-policy distillation: 2606.13657.)

Small matrices are decomposed whole in float64. Of larger ones a block Krylov space of W₀ᵀW₀ in
float32 (Musco & Musco, arXiv 1504.05477) gives û_i, v̂_i, σ̂_i with W₀v̂_i = σ̂_i û_i and residuals
r_i = W₀ᵀû_i − σ̂_i v̂_i. These are the very singular directions of a base that differs from W₀ by
‖(r_1 … r_k)‖_F at most (its backward error; no large value being missed by the random start), so
that is reported, in units of σ₁. A bound on the share itself would be idle where the spectrum is
dense near k, which is also where it matters least which directions count.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from megatron_dft.drift.moments import BLOCK, dot

_STEPS = 8  # blocks of the Krylov space
_GUARD = 16  # directions beyond the largest k: the last few settle last


@dataclass(frozen=True)
class Directions:
    """Leading singular directions of W₀, falling: left [m, K], right [n, K] float32, orthonormal;
    values, residuals: float64 [K], in units of ‖W₀‖_F, the residuals 0 from a whole decomposition.
    """

    left: torch.Tensor
    right: torch.Tensor
    values: np.ndarray
    residuals: np.ndarray


@dataclass(frozen=True)
class Shares:
    """Shares of ‖Δ‖_F² in [0, 1] for one k, and the backward error of the directions in σ₁."""

    left: float
    right: float
    both: float
    residual: float


def chance(shape: tuple[int, ...], k: int) -> tuple[float, float, float]:
    """(left, right, both) of a Δ with independent entries of equal variance."""
    left, right = min(k / shape[0], 1.0), min(k / shape[1], 1.0)
    return left, right, left * right


def basis_width(largest: int) -> int:
    """Dimensions of the Krylov space for `largest` directions."""
    return _STEPS * _block(largest)


def _block(largest: int) -> int:
    return max(8, -(-(largest + _GUARD) // 2))


def directions(base: torch.Tensor, largest: int) -> Directions | None:
    """The leading directions of W₀, at least `largest` where its rank allows; None for W₀ = 0.

    `base`: float32 [m, n], contiguous, not changed.
    """
    norm = _norm(base)
    if not norm or not base.numel():
        return None
    is_wide = base.shape[0] < base.shape[1]
    tall = base.T if is_wide else base
    if 2 * basis_width(largest) >= tall.shape[1]:
        found = _whole(tall, norm)
    else:
        found = _krylov(tall, norm, _block(largest), largest)
    # Beyond the rank there are no directions, only rounding.
    floor = found.values[0] * max(base.shape) * float(np.finfo(np.float32).eps)
    rank = int(np.count_nonzero(found.values > floor))
    kept = max(min(largest, rank), 1)
    left, right = found.left[:, :kept].contiguous(), found.right[:, :kept].contiguous()
    if is_wide:
        left, right = right, left
    values, residuals = found.values[:kept], found.residuals[:kept]
    return Directions(left, right, values, residuals)


def _norm(matrix: torch.Tensor) -> float:
    """‖W‖_F. torch's vector_norm in float64 would hold a float64 copy of it all."""
    return math.sqrt(sum(dot(part, part) for part in matrix.view(-1).split(BLOCK)))


def _whole(tall: torch.Tensor, norm: float) -> Directions:
    small = tall.shape[1]
    gram = torch.zeros(small, small, dtype=torch.float64)
    for rows in tall.split(4096):  # the float64 copy stays small
        part = rows.double() / norm
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_min(0).sqrt()
    right = vectors.flip(1)
    left = torch.cat([(rows.double() / norm) @ right for rows in tall.split(4096)])
    left /= values.clamp_min(1e-300)
    return Directions(left.float(), right.float(), values.numpy(), np.zeros(small))


def _krylov(tall: torch.Tensor, norm: float, block: int, largest: int) -> Directions:
    rows, columns = tall.shape
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    basis = torch.zeros(columns, _STEPS * block)
    image = torch.zeros(rows, _STEPS * block)
    fresh = torch.linalg.qr(torch.randn(columns, block, generator=generator))[0]
    rest = fresh
    for step in range(_STEPS):
        here = slice(step * block, (step + 1) * block)
        basis[:, here] = fresh
        image[:, here] = torch.mm(tall, fresh).div_(norm)
        rest = torch.mm(tall.T, image[:, here]).div_(norm)
        known = basis[:, : here.stop]
        # Twice: one pass of Gram-Schmidt leaves errors that float32 would amplify.
        for _ in range(2):
            rest -= known @ (known.T @ rest)
        if step < _STEPS - 1:
            fresh = torch.linalg.qr(rest)[0]
            # Where `rest` is nearly nothing its QR is noise, with parts along what is known.
            fresh = torch.linalg.qr(fresh - known @ (known.T @ fresh))[0]
    squares, turn = torch.linalg.eigh((image.T @ image).double())
    values, turn = squares.flip(0).clamp_min(0).sqrt(), turn.flip(1)
    safe = values.clamp_min(1e-30)
    # Only the last block is not mapped into the space itself: ‖W₀ᵀû − σ̂ v̂‖ is its part of it.
    residuals = torch.linalg.vector_norm(rest.double() @ turn[-block:], dim=0) / safe
    turn, safe = turn[:, :largest].float(), safe[:largest].float()
    left = (image @ turn) / safe
    return Directions(left, basis @ turn, values.numpy(), residuals.numpy())


def shares(
    delta: torch.Tensor, energy: float, found: Directions, ks: tuple[int, ...]
) -> dict[int, Shares] | None:
    """`Shares` of each k (or of the rank where that is less); None where Δ = 0.

    `delta`: float32 [m, n], not changed. `energy`: ‖Δ‖_F² in double.
    """
    if not energy:
        return None
    scale = energy**0.5
    right = torch.mm(delta, found.right).div_(scale)
    left = torch.mm(delta.T, found.left).div_(scale)
    core = torch.mm(found.left.T, right).double() ** 2
    sums = {
        "left": np.cumsum((left.double() ** 2).sum(0).numpy()),
        "right": np.cumsum((right.double() ** 2).sum(0).numpy()),
        # [i]: the sum of the leading (i + 1) × (i + 1) corner.
        "both": core.cumsum(0).cumsum(1).diagonal().numpy(),
    }
    result = {}
    for k in ks:
        last = min(k, len(found.values)) - 1
        values = {name: min(float(held[last]), 1.0) for name, held in sums.items()}
        residual = float(np.linalg.norm(found.residuals[: last + 1]) / found.values[0])
        result[k] = Shares(**values, residual=residual)
    return result
