"""Stream two or more checkpoints and measure every tensor's update, in parallel, in bounded memory.

Reads go block by block through buffers of a few hundred KiB; only a matrix whose singular values or
rows are wanted is held as one float32 update.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_dft.drift import forked
from megatron_dft.drift.checkpoint import Checkpoint, TensorReader
from megatron_dft.drift.moments import BLOCK, BlockStatistics, Moments, dot
from megatron_dft.drift.names import module_type
from megatron_dft.drift.spectrum import Spectrum, spectrum

_WORKER_BYTES = 24 << 20  # blocks, and the interpreter's pages that a fork soon copies
_TASK = 1 << 21  # elements: a worker takes up tensors until it has as many


@dataclass
class TensorDrift:
    """One tensor's update by each of M methods.

    moments, spectra, row_norms: one item a method; a spectrum is None but for matrices, `row_norms`
    (float32 [rows], ‖Δ_row‖) None but for embeddings and heads. `dots`: float64 [M, M], Σ Δ_i Δ_j.
    Arrays are numpy's: torch would pass tensors between processes through shared-memory files.
    """

    name: str
    shape: tuple[int, ...]
    moments: list[Moments]
    spectra: list[Spectrum | None]
    dots: np.ndarray
    row_norms: list[np.ndarray | None] = field(default_factory=list)
    base_row_norms: np.ndarray | None = None


class _Blocks:
    """One thread's buffers: a stored-dtype and a float32 block for each checkpoint."""

    def __init__(self, checkpoints: int):
        self.statistics = BlockStatistics()
        self.raw = torch.empty(8 * BLOCK, dtype=torch.uint8)
        self.float = [torch.empty(BLOCK) for _ in range(checkpoints)]
        self.delta = [torch.empty(BLOCK) for _ in range(checkpoints - 1)]
        self._update = torch.empty(_TASK)

    def update(self, count: int) -> torch.Tensor:
        """float32 [count] for a whole update, until the next call.

        Reused where it is small; numpy asks for huge pages: both spare thousands of page faults.
        """
        if count <= len(self._update):
            return self._update[:count]
        return torch.from_numpy(np.empty(count, np.float32))

    def read(
        self, reader: TensorReader, dtype: torch.dtype, start: int, out: torch.Tensor
    ) -> torch.Tensor:
        """Elements from `start` as float32 in `out` (float64 tensors: a new float64 block)."""
        if dtype == torch.float32:
            reader.read(start, out)
            return out
        raw = self.raw.view(dtype)[: out.numel()]
        reader.read(start, raw)
        if dtype == torch.float64:
            return raw.clone()
        return out.copy_(raw)


class Comparison:
    """Updates of `tuned[i]` against `base`, for the tensors that `pair.match` found."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Sequence[Checkpoint],
        names: Sequence[str],
        workers: int | None = None,
        spectra: bool = True,
    ):
        self._base, self._tuned, self._names = base, list(tuned), list(names)
        self._workers = workers or len(os.sched_getaffinity(0))
        self._spectra = spectra
        self._blocks = _Blocks(1 + len(self._tuned))  # each worker has its own, by the fork

    def run(self) -> Iterator[TensorDrift]:
        """Every tensor's drift, in the order in which they finish; none is kept here."""
        # The promise is 4x the largest stored tensor, what a worker has of its own included.
        largest = max((self._base.tensors[n].nbytes for n in self._names), default=0)
        budget = 4 * largest - self._workers * _WORKER_BYTES
        # Largest first: a big tensor picked up last would leave the other cores idle. Small ones
        # together: sending a task and its result costs about a millisecond.
        tasks: list[tuple[list[str], int]] = []
        room = 0
        for name in sorted(self._names, key=lambda n: -self._base.tensors[n].numel):
            if room <= 0:
                tasks.append(([], self._resident(name)))
                room = _TASK
            tasks[-1][0].append(name)
            room -= self._base.tensors[name].numel
        for tensors in forked.run(self._tensors, tasks, budget, self._workers):
            yield from tensors

    def _tensors(self, names: list[str]) -> list[TensorDrift]:
        return [self._tensor(name) for name in names]

    def _whole(self, name: str) -> bool:
        shape = self._base.tensors[name].shape
        return len(shape) == 2 and (self._spectra or module_type(name) in ("embed", "head"))

    def _resident(self, name: str) -> int:
        """Bytes held while a tensor is measured, besides a worker's own: its float32 update."""
        return 4 * self._base.tensors[name].numel if self._whole(name) else 0

    def _tensor(self, name: str) -> TensorDrift:
        shape, total = self._base.tensors[name].shape, self._base.tensors[name].numel
        readers = [c.open(name) for c in (self._base, *self._tuned)]
        methods, whole = len(self._tuned), self._whole(name)
        moments = [Moments() for _ in range(methods)]
        dots = np.zeros((methods, methods))
        # With one method the pass that sums also keeps the update; with more, memory holds one.
        kept = self._blocks.update(total) if whole and methods == 1 else None
        base_rows = self._row_sums(name) if module_type(name) in ("embed", "head") else None
        for start in range(0, total, BLOCK):
            stop = min(start + BLOCK, total)
            target = [kept[start:stop]] if kept is not None else None
            base, deltas = self._block(name, readers, start, stop, moments, target)
            for i in range(methods):
                for j in range(i, methods):
                    dots[i, j] += dot(deltas[i], deltas[j]) if i != j else 0.0
            if base_rows is not None:
                _add_rows(base_rows, base, start, shape[1])
        for i in range(methods):
            dots[i, i] = moments[i].delta_sq
        result = TensorDrift(name, shape, moments, [], np.triu(dots) + np.triu(dots, 1).T)
        if base_rows is not None:
            result.base_row_norms = base_rows.sqrt().float().numpy()
        for i in range(methods):
            delta = None
            if whole:
                delta = kept if kept is not None else self._update(name, readers, i)
                delta = delta.view(shape)
            energy = moments[i].delta_sq
            wanted = delta is not None and self._spectra
            result.spectra.append(spectrum(delta, energy) if wanted and delta is not None else None)
            result.row_norms.append(
                torch.linalg.vector_norm(delta, dim=1).numpy()
                if delta is not None and base_rows is not None
                else None
            )
        return result

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
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read one block on all sides, add it to `moments`; the float32 base and updates."""
        blocks, n = self._blocks, stop - start
        kinds = [c.tensors[name].dtype for c in (self._base, *self._tuned)]
        values = [
            blocks.read(reader, kind, start, out[:n])
            for reader, kind, out in zip(readers, kinds, blocks.float, strict=True)
        ]
        base, deltas = values[0], []
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
        return base.float(), deltas

    def _update(self, name: str, readers: list[TensorReader], method: int) -> torch.Tensor:
        """The whole update of one method, float32, read once more."""
        total = self._base.tensors[name].numel
        update = self._blocks.update(total)
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
