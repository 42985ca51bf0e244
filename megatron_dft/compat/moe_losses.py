"""A router's auxiliary and z losses weigh what Megatron's flags say, whatever share is supervised.

Under --calculate-per-token-loss every gradient is divided by the number N of supervised tokens of
the global batch. Megatron multiplies a router's losses by the number of *routed* tokens before,
taking the two for the same (megatron-core 0.19.2, core/transformer/moe/router.py): at 20 %
supervised the coefficient is five times the flag's. Its target, a mean over the micro-batches of
all replicas, needs the factor N / (micro-batches · replicas) instead, which a step has to know
before its first micro-batch (step/lookahead.py sets it).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.compat.hooks import wrap

_ROUTER = "megatron.core.transformer.moe.router"


class _State:
    installed = False
    tokens: Tensor | None = None
    z_factor: Tensor | None = None


class _ScaledGradient(torch.autograd.Function):
    """The value as it is, its gradient times `factor`."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def is_installed() -> bool:
    """Whether the routers' losses wait for `set_tokens`."""
    return _State.installed


def set_tokens(tokens: Tensor) -> None:
    """tokens: fp32 scalar, supervised tokens of the global batch over its micro-batches."""
    _State.tokens = tokens


def install() -> None:
    """Take the place of Megatron's factors in training; for runs with a router that has a loss."""
    _State.installed = True
    wrap(f"{_ROUTER}:TopKRouter.attach_and_log_load_balancing_loss", _attaching)
    wrap(f"{_ROUTER}:TopKRouter.apply_z_loss", _applying)
    wrap(f"{_ROUTER}:z_loss_func", _measuring)


def _attaching(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach_and_log_load_balancing_loss(self, *args, valid_token_count=None, **kwargs):
        if _State.tokens is not None:
            # Megatron multiplies by the group's size again.
            valid_token_count = _State.tokens / self.tp_cp_group.size()
        return original(self, *args, valid_token_count=valid_token_count, **kwargs)

    return attach_and_log_load_balancing_loss


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_z_loss(self, logits, padding_mask=None):
        is_used = self.config.moe_z_loss_coeff is not None and self.training
        if _State.tokens is not None and is_used and torch.is_grad_enabled():
            # Megatron's gradient is that of a sum over the rank's own tokens, padding left out.
            own = logits.new_full((), float(len(logits)), dtype=torch.float32)
            if padding_mask is not None:
                own = (~padding_mask).sum().float()
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(own, group=self.tp_cp_group)
            _State.z_factor = _State.tokens / own.clamp(min=1.0)
        try:
            return original(self, logits, padding_mask=padding_mask)
        finally:
            _State.z_factor = None

    return apply_z_loss


def _measuring(original: Callable[..., Any]) -> Callable[..., Any]:
    def z_loss_func(*args, **kwargs):
        loss = original(*args, **kwargs)
        if _State.z_factor is None:
            return loss
        return _ScaledGradient.apply(loss, _State.z_factor)

    return z_loss_func
