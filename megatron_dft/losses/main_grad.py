"""dW added to Megatron's `main_grad`, as its gradient accumulation fusion does.

megatron/core/tensor_parallel/layers.py (LinearWithGradAccumulationAndAsyncCommunication) adds dW to
`weight.main_grad` in the backward and sets `weight.grad_added_to_main_grad`; the hook of
distributed_data_parallel.py then drops what autograd returns. A weight that is used twice (MTP) has
to be served the same way both times, or one of its gradients is lost.
"""

import torch
from torch import Tensor


def main_grad_of(weight: Tensor, fuse: bool) -> Tensor | None:
    """Where dW is to be added, [V, h]; None where autograd is to return it."""
    return getattr(weight, "main_grad", None) if fuse else None


def placeholder(weight: Tensor) -> Tensor | None:
    """What autograd is given once `main_grad` has dW: its hooks want a tensor, on this device.

    Zeros where Megatron adds it (`zero_out_wgrad`: an embedding that shares the weight has its own
    gradient to come), else memory that nobody reads.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def deliver(weight: Tensor, d_weight: Tensor | None, fuse: bool) -> Tensor | None:
    """What autograd returns for a finished dW, after `main_grad` has got it where it should."""
    main_grad = main_grad_of(weight, fuse)
    if d_weight is None or main_grad is None:
        return d_weight
    main_grad.add_(d_weight)
    return placeholder(weight)
