"""L2-SP: pull the weights back to where training started, inside the optimizer's step.

The penalty ½λ‖θ − θ₀‖² (Li et al. 2018, arXiv 1802.01483) has the gradient λ(θ − θ₀). Under Adam a
gradient is divided by its own size, which would make λ meaningless, so the pull is decoupled as
AdamW decouples weight decay (arXiv 1711.05101): before the step, θ ← θ − η·λ·(θ − θ₀), η the
parameter group's learning rate. Under SGD this is exactly the penalty.
"""

from typing import Any

import torch


class L2SP:
    """A pre-step hook on a torch optimizer; made when its parameters hold the starting weights.

    It works on whatever the optimizer steps: full parameters, or with Megatron's distributed
    optimizer this rank's float32 shards (give it `megatron_optimizer.optimizer`; each of a
    ChainedOptimizer's members has its own). So the starting values are sharded likewise; they lie
    on the CPU, pinned where the parameters are on a GPU. The pull needs no communication.

    coefficient: λ ≥ 0; may be changed at any time (see `TargetController`). Raises ValueError for
    a negative or non-finite one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, coefficient: float):
        self.coefficient = _checked(coefficient)
        self._optimizer = optimizer
        self._start: dict[torch.Tensor, torch.Tensor] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                start = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda)
                self._start[p] = start.copy_(p.detach())
        self._handle = optimizer.register_step_pre_hook(self._pull)

    @torch.no_grad()
    def _pull(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        strength = _checked(self.coefficient)
        if not strength:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                # At η·λ > 1 the pull would overshoot the start; the start is as far as it goes.
                step = min(float(group["lr"]) * strength, 1.0)
                p.lerp_(self._start[p].to(p.device, non_blocking=True), step)

    @torch.no_grad()
    def squared_distance(self) -> torch.Tensor:
        """float64 scalar on the parameters' device: this rank's Σ(θ − θ₀)² (sum it over ranks)."""
        total = None
        for p, start in self._start.items():
            here = torch.linalg.vector_norm(p - start.to(p.device)).double() ** 2
            total = here if total is None else total + here
        return torch.zeros((), dtype=torch.float64) if total is None else total

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()


def _checked(coefficient: float) -> float:
    value = float(coefficient)
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"--l2sp-coeff: expected a number of 0 or more, got {coefficient}; 0 switches it off"
        )
    return value
