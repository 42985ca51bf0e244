"""How far a model under training has moved from its starting weights, whatever the layout.

Each element of the model is counted once over all ranks: a parameter that tensor-parallel ranks
replicate is counted on one of them, and data-parallel replicas split every shard between them. So
one all-reduce of a few numbers is all the communication, and a rank keeps 1 / replicas of its
shard's starting values, on the CPU (pinned where training is on a GPU).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

MODEL = "model"
_CHUNK = 1 << 23  # elements compared at once: 32 MiB of starting values on the device


@dataclass(frozen=True)
class TrackedParameter:
    """One parameter of this rank.

    tensor: this rank's shard, live: read at every measurement, never changed. label: the group it
    is reported in. counted: False where another rank of the model counts the same elements (a
    tensor-parallel replica, the last stage's copy of a tied embedding). replicas: the ranks that
    hold this very shard (data-parallel, or expert-data-parallel group); None for this rank alone.
    elements: how many leading elements are weights, where padding follows (None: all).
    """

    tensor: torch.Tensor
    label: str
    counted: bool = True
    replicas: dist.ProcessGroup | None = None
    elements: int | None = None


@dataclass
class _Part:
    parameter: TrackedParameter
    begin: int
    end: int
    start: torch.Tensor  # 1-D, this rank's elements as they were


class UpdateTracker:
    """Compares parameters with what they were when the tracker was made.

    parameters: this rank's; their shapes and order may differ from rank to rank. labels: every
    label of the whole model, the same list on all ranks. world: the group over which the model is
    laid out, all of whose ranks call `measure` (None: the default group; without one, this rank).
    """

    def __init__(
        self,
        parameters: Iterable[TrackedParameter],
        labels: Sequence[str],
        world: dist.ProcessGroup | None = None,
    ):
        self._labels = list(labels)
        self._world = world
        self._parts: list[_Part] = []
        self._device = torch.device("cpu")
        for parameter in parameters:
            if parameter.label not in self._labels:
                raise ValueError(f"label {parameter.label!r} is not one of {self._labels}")
            self._device = parameter.tensor.device
            if parameter.counted and (part := _split(parameter)) is not None:
                self._parts.append(part)

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Collective. label (and "model") → update_norm, relative_norm, unchanged_bf16.

        update_norm is ‖θ − θ₀‖, relative_norm ‖θ − θ₀‖/‖θ₀‖ (0 where θ₀ = 0), unchanged_bf16 the
        share of weights with the same bfloat16 value, all as in `megatron-dft drift`. Call it when
        parameters are whole: with overlap_param_gather after the gather.
        """
        sums = torch.zeros(len(self._labels), 4, dtype=torch.float64, device=self._device)
        for part in self._parts:
            row = sums[self._labels.index(part.parameter.label)]
            live = part.parameter.tensor.detach().reshape(-1)[part.begin : part.end]
            for s in range(0, part.end - part.begin, _CHUNK):
                start = part.start[s : s + _CHUNK].to(live.device, non_blocking=True)
                row += _sums(live[s : s + _CHUNK], start)
        if dist.is_initialized():
            dist.all_reduce(sums, group=self._world)
        table = sums.cpu()
        rows = dict(zip(self._labels, table, strict=True)) | {MODEL: table.sum(0)}
        return {label: _report(row.tolist()) for label, row in rows.items()}


def _split(parameter: TrackedParameter) -> _Part | None:
    """This rank's part of the replicas' work, its starting values copied to the CPU."""
    total = parameter.tensor.numel() if parameter.elements is None else parameter.elements
    rank, size = 0, 1
    if parameter.replicas is not None:
        rank, size = dist.get_rank(parameter.replicas), dist.get_world_size(parameter.replicas)
    begin, end = total * rank // size, total * (rank + 1) // size
    if begin == end:
        return None
    live = parameter.tensor.detach().reshape(-1)[begin:end]
    start = torch.empty(end - begin, dtype=live.dtype, pin_memory=live.is_cuda)
    start.copy_(live)
    return _Part(parameter, begin, end, start)


def _sums(live: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """float64 [4]: Σ(θ − θ₀)², Σθ₀², unchanged at bfloat16, count, of two 1-D tensors."""
    delta = live.float() - start.float()
    # Norms of float32 blocks of a few million elements, summed in double: exact to about 1e-7.
    return torch.stack(
        (
            torch.linalg.vector_norm(delta, dtype=torch.float32).double() ** 2,
            torch.linalg.vector_norm(start, dtype=torch.float32).double() ** 2,
            (live.bfloat16() == start.bfloat16()).sum().double(),
            torch.full((), float(live.numel()), dtype=torch.float64, device=live.device),
        )
    )


def _report(row: list[float]) -> dict[str, float]:
    delta, base, same, count = row
    return {
        "update_norm": delta**0.5,
        "relative_norm": (delta / base) ** 0.5 if base else 0.0,
        "unchanged_bf16": same / count if count else 1.0,
    }
