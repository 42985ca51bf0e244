"""The target's logit as an fp32 dot product of its hidden state and its row of the output layer.

A bf16 product rounds a logit near 20 by up to 0.06, hence p by up to 6 %, and DFT multiplies by p.
Shapes: n rows, h hidden size, V rows of the output layer on this rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dft.losses.kernels.tiles import device_of

BLOCK = 1024


@triton.jit
def target_logit_kernel(
    hidden, hidden_row, weight, weight_row, target, out, vocab_start, vocab, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(target + row) - vocab_start
    total = tl.zeros([BLOCK], tl.float32)
    if (column >= 0) & (column < vocab):
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(hidden + row * hidden_row + at, mask=at < size, other=0.0)
            w = tl.load(weight + column * weight_row + at, mask=at < size, other=0.0)
            total += x.to(tl.float32) * w.to(tl.float32)
    tl.store(out + row, tl.sum(total, axis=0))


def target_logit(
    hidden_nh: Tensor, weight_Vh: Tensor, target_n: Tensor, vocab_start: int, real: int
) -> Tensor:
    """[n] fp32: hidden · weight[target]; 0 where this rank's first `real` rows do not hold it."""
    out = torch.empty(len(hidden_nh), dtype=torch.float32, device=hidden_nh.device)
    if len(out):
        with device_of(out):
            target_logit_kernel[(len(out),)](
                hidden_nh, hidden_nh.stride(0), weight_Vh, weight_Vh.stride(0), target_n, out,
                vocab_start, real, hidden_nh.shape[1], BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return out
