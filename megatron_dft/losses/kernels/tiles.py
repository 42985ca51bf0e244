"""What the kernels share: tiles of a row of logits, and the device that a kernel is started on.

A tile is [LANES, WIDE] columns, WIDE of them in one 16-byte access of one thread: a reduction over
the second axis then needs no exchange between threads.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# e^-200 is 0 in fp32, and 0 · −200 is 0 where 0 · −inf would be NaN.
LOWEST = tl.constexpr(-200.0)
INFINITY = tl.constexpr(float("inf"))
NO_COLUMN = tl.constexpr(2**31 - 1)


def wide(logits: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // logits.element_size()


def device_of(logits: Tensor):
    """Triton starts a kernel on the current device, whatever its tensors are on."""
    return torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()


def blocks(total: int, block: int) -> int:
    return -(-total // block)


@triton.jit
def tile_columns(start, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Columns [LANES, WIDE] of the tile that begins at `start`."""
    return start + tl.arange(0, LANES)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]


@triton.jit
def guided(own, reference, share):
    """(1 − η)·z + η·z_ref, 0 < η < 1: the reference that is part model (vocab_statistics.py)."""
    return share * reference + (1.0 - share) * own


@triton.jit
def load(row, columns, stride, end, UNIT: tl.constexpr, MASKED: tl.constexpr):
    """Logits at `columns` of a row, −inf from `end` on; UNIT: neighbours in memory."""
    where = row + columns if UNIT else row + columns.to(tl.int64) * stride
    if MASKED:
        return tl.load(where, mask=columns < end, other=-INFINITY)
    return tl.load(where)
