"""The rows of a whole step at its first micro-batch: a router's losses have to know them all.

Their gradients are divided by the supervised tokens of the global batch, like every gradient, and
so have to be multiplied by that number when they are made (compat/moe_losses.py). The rows are a
few kilobytes each and lie in host memory; for a model without experts nothing is read ahead.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_dft.compat import moe_losses

Rows = dict[str, Tensor]

# One iterator a virtual pipeline stage; each is read to the end of the step.
_waiting: WeakKeyDictionary[Any, deque[Rows]] = WeakKeyDictionary()


def next_rows(iterator: Iterator[Rows], training: bool) -> Rows:
    """The next micro-batch's rows, on the host; all of the step are read where training needs it.

    Collective over the data-parallel group at the first micro-batch of a step with routers' losses.
    """
    if not (training and moe_losses.is_installed()):
        return next(iterator)
    queue = _waiting.setdefault(iterator, deque())
    if not queue:
        queue.extend([next(iterator) for _ in range(get_num_microbatches())])
        moe_losses.set_tokens(_tokens_of_a_micro_batch(queue))
    return queue.popleft()


def _tokens_of_a_micro_batch(step: deque[Rows]) -> Tensor:
    """fp32 scalar on the device: supervised tokens of the global batch over its micro-batches."""
    own = sum(float(rows["loss_mask"].sum()) for rows in step)
    tokens = torch.tensor([own, len(step)], dtype=torch.float32, device="cuda")
    dist.all_reduce(tokens, group=mpu.get_data_parallel_group())
    return tokens[0] / tokens[1]
