"""The largest singular values of an update matrix by Golub-Kahan-Lanczos, with error bounds.

From a random start vector, up to `steps` pairs of products Δv, Δᵀu build orthonormal U, V with
Δ V = U B, B bidiagonal (Golub & Kahan 1965). The singular values of B approach those of Δ from
below. For its largest, σ̂ = σ₁(B) with left vector p, the residual
β·|p_last| bounds the distance to a singular value of Δ; and as B holds Σσ̂² of ‖Δ‖_F²,
σ₁² ≤ σ̂₁² + (‖Δ‖_F² - ‖B‖_F²) always.
"""

from dataclasses import dataclass

import numpy as np
import torch

_EXACT_BELOW = 96  # smaller side up to which LAPACK's full SVD is as quick
_STEPS = 8
_GONE = 1e-7  # a remainder this small (of ‖Δ‖_F) is float32 rounding: the space is exhausted
_CLOSE = 0.01  # of σ₁: a residual at which the steps end early
_SHOWN = 4


@dataclass(frozen=True)
class Spectrum:
    """`sigma1` of Δ, the shares of ‖Δ‖_F² in the top 1 and top 4 directions, and the error.

    `sigma1` is a lower bound where it is not exact; some singular value of Δ lies within `error`
    of it (in the units of Δ), and `error` is 0.0 for the full SVD. `top_share` and `top4_share`
    inherit the lower bound; `stable_rank` = ‖Δ‖_F² / σ₁² is then an upper bound.
    """

    sigma1: float
    error: float
    stable_rank: float | None
    top_share: float | None
    top4_share: float | None


def _result(values: torch.Tensor, error: float, energy: float) -> Spectrum:
    if not energy:
        return Spectrum(0.0, 0.0, None, None, None)
    squares = values.double() ** 2
    top = float(squares[0])
    share, share4 = top / energy, float(squares[:_SHOWN].sum()) / energy
    rank = energy / top if top else None
    return Spectrum(top**0.5, error, rank, min(share, 1.0), min(share4, 1.0))


def spectrum(delta: torch.Tensor, energy: float, steps: int = _STEPS) -> Spectrum:
    """Spectrum of one update matrix.

    `delta`: float32 [rows, columns], contiguous, not changed. `energy`: ‖Δ‖_F² in double.
    """
    rows, columns = delta.shape
    if not energy or not delta.numel():
        return Spectrum(0.0, 0.0, None, None, None)
    if min(rows, columns) <= _EXACT_BELOW:
        gram = delta.double()
        gram = gram @ gram.T if rows <= columns else gram.T @ gram
        values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).sqrt()
        return _result(values, 0.0, energy)
    # Scale so that nothing under- or overflows in float32.
    scale = energy**0.5
    values, residual = _lanczos(delta, min(steps, rows, columns), scale)
    return _result(values * scale, residual * scale, energy)


def _lanczos(delta: torch.Tensor, steps: int, scale: float) -> tuple[torch.Tensor, float]:
    """Singular values (float64, falling) and the largest one's residual, in units of `scale`."""
    rows, columns = delta.shape
    transposed = delta.T
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    v_SC = torch.zeros(steps + 1, columns)
    alpha: list[float] = []
    beta: list[float] = []
    start = torch.randn(columns, generator=generator)
    torch.div(start, start.norm(), out=v_SC[0])
    u = torch.zeros(rows)
    for step in range(steps):
        v = v_SC[step]
        # With the v's kept orthogonal the u's stay so by themselves (Simon & Zha 2000).
        u = torch.mv(delta, v).div_(scale).sub_(u, alpha=beta[-1] if beta else 0.0)
        alpha.append(float(torch.linalg.vector_norm(u)))
        if alpha[-1] < _GONE:
            beta.append(0.0)
            break
        u.div_(alpha[-1])
        w = torch.mv(transposed, u).div_(scale)
        seen = v_SC[: step + 1]
        # Twice: one Gram-Schmidt pass leaves errors that float32 would amplify.
        for _ in range(2):
            w.addmv_(seen.T, torch.mv(seen, w), alpha=-1.0)
        beta.append(float(torch.linalg.vector_norm(w)))
        if beta[-1] < _GONE:
            break
        if step % 2:  # the small SVD costs as much as a step
            values, residual = _ritz(alpha, beta)
            # Values err by about the square of a relative residual: 1 % of it is enough.
            if residual <= _CLOSE * float(values[0]):
                break
        torch.div(w, beta[-1], out=v_SC[step + 1])
    return _ritz(alpha, beta)


def _ritz(alpha: list[float], beta: list[float]) -> tuple[torch.Tensor, float]:
    """Singular values of B (diagonal alpha, above it beta) and the residual of the largest.

    Δᵀ U = V Bᵀ + β v_next e_lastᵀ, so β |p_last| is what is left outside the subspace.
    """
    size = len(alpha)
    bidiagonal = np.zeros((size, size))
    bidiagonal[range(size), range(size)] = alpha
    bidiagonal[range(size - 1), range(1, size)] = beta[: size - 1]
    left, values, _ = np.linalg.svd(bidiagonal)
    return torch.from_numpy(values), float(beta[-1] * abs(left[-1, 0]))
