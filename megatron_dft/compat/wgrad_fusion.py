"""Gradient accumulation fusion without NVIDIA apex: the two functions of its extension, on cuBLAS.

Megatron's own linear layers (the output layer, under Transformer Engine's spec too) add dW into
`main_grad` by apex's module `fused_weight_gradient_mlp_cuda` and fail at model build where it is
missing (megatron-core 0.19.2, core/tensor_parallel/layers.py). What the module does is one matrix
product that accumulates in the dtype of `main_grad`, which torch has as well.

Shapes: T tokens of a micro-batch, I inputs, O outputs of the layer on this rank.
"""

import importlib.util

import torch
from torch import Tensor

from megatron_dft.compat import hooks

NAME = "fused_weight_gradient_mlp_cuda"
_LAYERS = "megatron.core.tensor_parallel.layers"


def wgrad_gemm_accum_fp32(input_TI: Tensor, d_output_TO: Tensor, main_grad_OI: Tensor) -> None:
    """main_grad += d_outputᵀ · input, in place, summed in fp32.

    input_TI, d_output_TO: bf16, fp16 or fp32, the same dtype. main_grad_OI: fp32.
    """
    if input_TI.dtype == torch.float32:
        main_grad_OI.addmm_(d_output_TO.t(), input_TI)
    elif main_grad_OI.is_cuda:
        # One cuBLAS call that reads 16-bit factors and adds to an fp32 matrix.
        torch.ops.aten.addmm.dtype_out(
            main_grad_OI, d_output_TO.t(), input_TI, torch.float32, out=main_grad_OI
        )
    else:  # torch has no kernel of mixed dtypes for CPUs
        main_grad_OI.addmm_(d_output_TO.t().float(), input_TI.float())


def wgrad_gemm_accum_fp16(input_TI: Tensor, d_output_TO: Tensor, main_grad_OI: Tensor) -> None:
    """The same for a `main_grad` in the 16-bit dtype of its factors."""
    main_grad_OI.addmm_(d_output_TO.t(), input_TI)


def is_apex_there() -> bool:
    """Whether apex's own extension is installed."""
    return importlib.util.find_spec(NAME) is not None and not hooks.is_provided(NAME)


def install() -> None:
    """Take the place of apex's module where it is absent; does nothing where it is there.

    Called before or after Megatron's layers are imported.
    """
    if is_apex_there():
        return
    hooks.provide(NAME, [wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16], users=[_LAYERS])

    def make(original):
        return True

    hooks.wrap(f"{_LAYERS}:_grad_accum_fusion_available", make)
