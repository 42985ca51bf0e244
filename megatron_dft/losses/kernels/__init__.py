"""Triton kernels of the losses for a GPU: one read of the logits for all statistics, one read and
write for their gradient. This file imports without Triton; the others are imported where `serve`
says so.

statistics     K1: maximum, Σexp, target logit, argmax; on demand entropy, Σp², KL, top-k lanes
likeliest      the k largest logits of a row, from K1's lane maxima
merge          statistics of vocabulary parts → of the whole, and what they say of the target
gradient       K2: the gradient of every statistic in one pass, in place if asked
target_logit   the target's logit as an fp32 dot product of its two rows
products       matrix products that are summed in fp32
"""

import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Kernels run on CPU tensors then: how they are tested without a GPU, and very slow.
INTERPRETER = "TRITON_INTERPRET"


def serve(logits: Tensor) -> bool:
    """Whether the kernels take tensors like these: on a GPU, or anywhere under the interpreter."""
    asked = logits.is_cuda or (
        logits.device.type == "cpu" and os.environ.get(INTERPRETER, "0") == "1"
    )
    return asked and logits.dtype in DTYPES and importlib.util.find_spec("triton") is not None
