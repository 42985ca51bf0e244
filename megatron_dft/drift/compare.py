"""Stream two or more checkpoints and measure every tensor's update, in parallel, in bounded memory.

Reads go block by block through buffers of a few hundred KiB; only a matrix whose singular values or
rows are wanted is held as one float32 update.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_dft.drift import forked, principal, support
from megatron_dft.drift.blocks import TASK, Blocks
from megatron_dft.drift.checkpoint import Checkpoint, TensorReader
from megatron_dft.drift.moments import BLOCK, Moments, count_support, dot
from megatron_dft.drift.names import module_type
from megatron_dft.drift.principal import Shares
from megatron_dft.drift.spectrum import Spectrum, spectrum

# Blocks, and the interpreter's pages that a fork soon copies: 27 to 34 MiB.
_WORKER_BYTES = 36 << 20


@dataclass
class TensorDrift:
    """One tensor's update by each of M methods.

    moments, spectra, principal, row_norms: one item a method; spectrum and principal (by k) are
    None but for matrices, `row_norms` (float32 [rows], ‖Δ_row‖) but for embeddings and heads.
    `dots`: float64 [M, M], Σ Δ_i Δ_j; `both_changed`: int64 [M, M], weights that both changed.
    Arrays are numpy's: torch would pass tensors between processes through shared-memory files.
    """

    name: str
    shape: tuple[int, ...]
    moments: list[Moments]
    spectra: list[Spectrum | None]
    dots: np.ndarray
    both_changed: np.ndarray
    principal: list[dict[int, Shares] | None] = field(default_factory=list)
    row_norms: list[np.ndarray | None] = field(default_factory=list)
    base_row_norms: np.ndarray | None = None


class Comparison:
    """Updates of `tuned[i]` against `base`, for the tensors that `pair.match` found."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Sequence[Checkpoint],
        names: Sequence[str],
        workers: int | None = None,
        spectra: bool = True,
        principal_ks: Sequence[int] = (),
        load_dtype: torch.dtype | None = None,
    ):
        """`principal_ks`: the k of `principal.shares`, none of them by default: they cost more than
        all the rest. `load_dtype`: see `support`; None for the coarsest of those stored."""
        self._base, self._tuned, self._names = base, list(tuned), list(names)
        self._workers = workers or len(os.sched_getaffinity(0))
        self._spectra = spectra
        self._ks, self._load_dtype = tuple(principal_ks), load_dtype
        self._blocks = Blocks(1 + len(self._tuned))  # each worker has its own, by the fork

    def run(self) -> Iterator[TensorDrift]:
        """Every tensor's drift, in the order in which they finish; none is kept here."""
        # The promise is 4x the largest stored tensor, what a worker has of its own included.
        largest = max((self._base.tensors[n].nbytes for n in self._names), default=0)
        workers = self._affordable(4 * largest)
        budget = 4 * largest - workers * _WORKER_BYTES
        # Largest first: a big tensor picked up last would leave the other cores idle. Small ones
        # together: sending a task and its result costs about a millisecond.
        tasks: list[tuple[list[str], int]] = []
        room = 0
        for name in sorted(self._names, key=lambda n: -self._base.tensors[n].numel):
            if room <= 0:
                tasks.append(([], self._resident(name)))
                room = TASK
            tasks[-1][0].append(name)
            room -= self._base.tensors[name].numel
        for tensors in forked.run(self._tensors, tasks, budget, workers):
            yield from tensors

    def _affordable(self, promised: int) -> int:
        """Workers: fewer where what each keeps, of the subspaces' bases too, would break the
        promise. Two at least without bases: of a small checkpoint it means nothing."""
        names = [n for n in self._names if self._whole(n)]
        bases = [self._resident(n) - 4 * self._base.tensors[n].numel for n in names if self._ks]
        each = _WORKER_BYTES + 2 * int(np.median(bases) if bases else 0)
        rest = promised - max((self._resident(n) for n in names), default=0)
        return min(self._workers, max(1 if bases else 2, rest // each))

    def _tensors(self, names: list[str]) -> list[TensorDrift]:
        return [self._tensor(name) for name in names]

    def _whole(self, name: str) -> bool:
        shape = self._base.tensors[name].shape
        asked = self._spectra or self._ks or module_type(name) in ("embed", "head")
        return len(shape) == 2 and bool(asked)

    def _resident(self, name: str) -> int:
        """Bytes held while a tensor is measured, besides a worker's own: one float32 copy, which is
        the base first and each update in turn, and the bases of its subspaces."""
        if not self._whole(name):
            return 0
        info = self._base.tensors[name]
        # The space, its image, and what one turn of them takes.
        width = 3 * principal.basis_width(max(self._ks)) if self._ks else 0
        return 4 * (info.numel + sum(info.shape) * min(width, *info.shape))

    def _tensor(self, name: str) -> TensorDrift:
        info = self._base.tensors[name]
        shape, total = info.shape, info.numel
        readers = [c.open(name) for c in (self._base, *self._tuned)]
        methods = len(self._tuned)
        whole = self._blocks.whole(total) if self._whole(name) else None
        threshold, subspaces = self._of_base(name, whole)
        moments = [Moments() for _ in range(methods)]
        dots, both = np.zeros((methods, methods)), np.zeros((methods, methods), dtype=np.int64)
        # With one method the pass that sums also keeps the update; with more, memory holds one.
        kept = whole if methods == 1 else None
        base_rows = self._row_sums(name) if module_type(name) in ("embed", "head") else None
        for start in range(0, total, BLOCK):
            stop = min(start + BLOCK, total)
            target = [kept[start:stop]] if kept is not None else None
            base, deltas, changed = self._block(name, readers, start, stop, moments, target)
            near = support.is_near_zero(base, threshold, self._blocks.near_zero)
            for i in range(methods):
                count_support(moments[i], changed[i], near)
                for j in range(i + 1, methods):
                    dots[i, j] += dot(deltas[i], deltas[j])
            both += support.intersections(changed)
            if base_rows is not None:
                _add_rows(base_rows, base, start, shape[1])
        for i in range(methods):
            dots[i, i] = moments[i].delta_sq
        result = TensorDrift(name, shape, moments, [], np.triu(dots) + np.triu(dots, 1).T, both)
        if base_rows is not None:
            result.base_row_norms = base_rows.sqrt().float().numpy()
        for i in range(methods):
            delta = None
            if whole is not None:
                delta = whole if kept is not None else self._update(name, readers, i, whole)
                delta = delta.view(shape)
            self._of_update(result, delta, moments[i].delta_sq, subspaces)
        return result

    def _of_base(
        self, name: str, whole: torch.Tensor | None
    ) -> tuple[float, principal.Directions | None]:
        """The base's near-zero threshold and leading directions. `whole` then holds the base."""
        info, blocks = self._base.tensors[name], lambda: self._blocks.stream(self._base, name)
        wanted = whole is not None and bool(self._ks) and min(info.shape) > 0
        if whole is not None and wanted:
            for start, block in zip(range(0, info.numel, BLOCK), blocks(), strict=True):
                whole[start : start + len(block)] = block
            held: torch.Tensor = whole
            blocks = lambda: iter(held.split(BLOCK))  # noqa: E731
        is_coarse = info.dtype == torch.bfloat16
        threshold = support.quantile(blocks, info.numel, is_coarse, support.QUANTILE)
        if whole is None or not wanted:
            return threshold, None
        if not all(bool(torch.isfinite(part).all()) for part in held.split(BLOCK)):
            return threshold, None  # the pass over the blocks says where
        return threshold, principal.directions(whole.view(info.shape), max(self._ks))

    def _of_update(
        self,
        result: TensorDrift,
        delta: torch.Tensor | None,
        energy: float,
        subspaces: principal.Directions | None,
    ) -> None:
        """Append what is measured on one method's whole update (None: not a matrix)."""
        is_embedding = result.base_row_norms is not None
        spectral = spectrum(delta, energy) if delta is not None and self._spectra else None
        shares = None
        if delta is not None and subspaces is not None:
            shares = principal.shares(delta, energy, subspaces, self._ks)
        norms = None
        if delta is not None and is_embedding:
            norms = torch.linalg.vector_norm(delta, dim=1).numpy()
        result.spectra.append(spectral)
        result.principal.append(shares)
        result.row_norms.append(norms)

    def _row_sums(self, name: str) -> torch.Tensor | None:
        shape = self._base.tensors[name].shape
        return torch.zeros(shape[0], dtype=torch.float64) if len(shape) == 2 else None

    def _block(
        self,
        name: str,
        readers: list[TensorReader],
        start: int,
        stop: int,
        moments: list[Moments],
        target: list[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[np.ndarray]]:
        """Read one block on all sides, add it to `moments`; the float32 base, the updates, and
        which entries each changed."""
        blocks, n = self._blocks, stop - start
        kinds = [c.tensors[name].dtype for c in (self._base, *self._tuned)]
        values = [
            blocks.read(reader, kind, start, out[:n])
            for reader, kind, out in zip(readers, kinds, blocks.float, strict=True)
        ]
        base, deltas, changed = values[0], [], []
        for i, tuned in enumerate(values[1:]):
            delta = target[i] if target else blocks.delta[i][:n]
            if torch.float64 in (base.dtype, tuned.dtype):
                delta.copy_(tuned.double() - base.double())
            else:
                torch.sub(tuned, base, out=delta)
            both_bf16 = kinds[0] == kinds[i + 1] == torch.bfloat16
            fine = blocks.statistics.add(moments[i], base.float(), delta, tuned.float(), both_bf16)
            if not fine:
                raise self._not_finite(name, base, tuned, i, start)
            deltas.append(delta)
            load = support.load_dtype(kinds[0], kinds[i + 1], self._load_dtype)
            rounding = None if kinds[0] == kinds[i + 1] == load else load
            changed.append(support.changed(base, tuned, delta, rounding, self._blocks.changed[i]))
        return base.float(), deltas, changed

    def _update(
        self, name: str, readers: list[TensorReader], method: int, update: torch.Tensor
    ) -> torch.Tensor:
        """The whole update of one method in `update`, float32, read once more."""
        total = self._base.tensors[name].numel
        kinds = [self._base.tensors[name].dtype, self._tuned[method].tensors[name].dtype]
        blocks = self._blocks
        for start in range(0, total, BLOCK):
            n = min(BLOCK, total - start)
            base = blocks.read(readers[0], kinds[0], start, blocks.float[0][:n])
            tuned = blocks.read(readers[method + 1], kinds[1], start, blocks.float[1][:n])
            update[start : start + n].copy_(tuned - base)
        return update

    def _not_finite(
        self, name: str, base: torch.Tensor, tuned: torch.Tensor, method: int, start: int
    ) -> ValueError:
        for side, values in ((self._base, base), (self._tuned[method], tuned)):
            bad = torch.nonzero(~torch.isfinite(values)).flatten()
            if len(bad):
                index = start + int(bad[0])
                place = []
                for size in reversed(self._base.tensors[name].shape):
                    place.append(index % size)
                    index //= size
                return ValueError(
                    f"{side.path}: {name}{place[::-1]} is {float(values[bad[0]])}; the run that "
                    "wrote it diverged, take an earlier checkpoint"
                )
        return ValueError(f"{name}: the update overflows float32, so it cannot be measured")


def _add_rows(sums: torch.Tensor, block: torch.Tensor, start: int, columns: int) -> None:
    """Add squares of a flat block to the sums of the rows it covers (rows may be cut)."""
    if not columns:
        return
    position, end = start, start + block.numel()
    while position < end:
        row = position // columns
        whole_rows = (end - position) // columns if position % columns == 0 else 0
        count = whole_rows * columns or min(end - position, columns - position % columns)
        part = block[position - start : position - start + count]
        rows = max(whole_rows, 1)
        norms = torch.linalg.vector_norm(part.view(rows, -1), dim=1).double()
        sums[row : row + rows] += norms**2
        position += count
