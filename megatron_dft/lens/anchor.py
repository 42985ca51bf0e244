"""L2-SP: pull the weights back to where training started, inside the optimizer's step.

The penalty ½λ‖θ − θ₀‖² (Li et al. 2018, arXiv 1802.01483) has the gradient λ(θ − θ₀). Under Adam a
gradient is divided by its own size, which would make λ meaningless, so the pull is decoupled as
AdamW decouples weight decay (arXiv 1711.05101): before the step, θ ← θ − η·λ·(θ − θ₀), η the
parameter group's learning rate. Under SGD this is exactly the penalty.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class L2SP:
    """A pre-step hook on a torch optimizer; made when its parameters hold the starting weights.

    It works on whatever the optimizer steps: full parameters, or with Megatron's distributed
    optimizer this rank's float32 shards (give it `megatron_optimizer.optimizer`; each of a
    ChainedOptimizer's members has its own). So the starting values are sharded likewise. Where they
    are bf16 values, as a bf16 checkpoint's are, they are kept in bf16. They stay on the GPU while
    they take little of it; else they lie in pinned memory, and the next parameter's are copied
    while one is pulled. The pull needs no communication.

    coefficient: λ ≥ 0; may be changed at any time (see `TargetController`). Raises ValueError for
    a negative or non-finite one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, coefficient: float):
        self.coefficient = _checked(coefficient)
        self._optimizer = optimizer
        self._start: dict[Tensor, Tensor] = {}
        self._stream: Any = None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        exact = {p: _narrow(p) for p in parameters}
        size = sum(p.numel() * dtype.itemsize for p, dtype in exact.items())
        for p, dtype in exact.items():
            if p.is_cuda and size > _device_budget(p.device):
                start = torch.empty(p.shape, dtype=dtype, pin_memory=True)
            else:
                start = torch.empty_like(p, dtype=dtype)
            self._start[p] = start.copy_(p.detach())
        self._handle = optimizer.register_step_pre_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        strength = _checked(self.coefficient)
        if not strength:
            return
        steps = {
            # At η·λ > 1 the pull would overshoot the start; the start is as far as it goes.
            p: min(float(group["lr"]) * strength, 1.0)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for p, start in self._on_device(list(steps)):
            p.lerp_(start.to(p.dtype), steps[p])

    def _on_device(self, parameters: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its start beside it; one that is copied is copied a turn ahead."""
        ahead = [self._fetch(p) for p in parameters[:1]]
        for p, after in zip(parameters, [*parameters[1:], None], strict=True):
            start, copied = ahead.pop()
            if after is not None:
                ahead.append(self._fetch(after))
            if copied is not None:
                torch.cuda.current_stream().wait_event(copied)
                start.record_stream(torch.cuda.current_stream())
            yield p, start

    def _fetch(self, parameter: Tensor) -> tuple[Tensor, Any]:
        """(start on the parameter's device, the event of its copy or None)."""
        start = self._start[parameter]
        if start.device == parameter.device:
            return start, None
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            return start.to(parameter.device, non_blocking=True), self._stream.record_event()

    @torch.no_grad()
    def squared_distance(self) -> torch.Tensor:
        """float64 scalar on the parameters' device: this rank's Σ(θ − θ₀)² (sum it over ranks)."""
        total = None
        for p, start in self._start.items():
            here = torch.linalg.vector_norm(p - start.to(p.device, p.dtype)).double() ** 2
            total = here if total is None else total + here
        return torch.zeros((), dtype=torch.float64) if total is None else total

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()


def _narrow(parameter: Tensor) -> torch.dtype:
    """The narrowest dtype that keeps these values."""
    values = parameter.detach()
    if bool((values.bfloat16().to(values.dtype) == values).all()):
        return torch.bfloat16
    return values.dtype


def _device_budget(device: torch.device) -> float:
    """Bytes of a GPU that starting values may take: a twentieth of it."""
    return torch.cuda.get_device_properties(device).total_memory / 20


def _checked(coefficient: float) -> float:
    value = float(coefficient)
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"--l2sp-coeff: expected a number of 0 or more, got {coefficient}; 0 switches it off"
        )
    return value
