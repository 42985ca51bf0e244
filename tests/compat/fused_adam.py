"""Transformer Engine's FusedAdam (2.20, pytorch/optimizers/fused_adam.py) in torch: where it keeps
what, and what it does not take."""

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its steps in its groups, as an int alone, and knows two states."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, **_: Any
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every state has a dtype of its own, by its name."""
        for state in state_dict["state"].values():
            for name in state:
                {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}[name]
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """The kernel's arithmetic (Loshchilov and Hutter, arXiv 1711.05101)."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            if not isinstance(group["step"], int):
                raise TypeError("multi_tensor_adam(): incompatible function arguments: step")
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                (first, second), count = group["betas"], group["step"]
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                mean.lerp_(parameter.grad, 1 - first)
                square.mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                scale = (square / (1 - second**count)).sqrt().add_(group["eps"])
                parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - first**count))
