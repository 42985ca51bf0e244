"""The rows of a whole step at its first micro-batch, for what has to know them all.

Every gradient is divided by the number of supervised tokens of the global batch when the step has
ended. What is to be divided by something else is multiplied by that number when it is made: the
losses of routers (compat/moe_losses.py), and token losses under --loss-normalizer weights. The rows
are a few kilobytes each and lie in host memory; a run without either reads nothing ahead.
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
from megatron_dft.flags.settings import settings

Rows = dict[str, Tensor]

# One iterator a virtual pipeline stage; each is read to the end of the step.
_waiting: WeakKeyDictionary[Any, deque[Rows]] = WeakKeyDictionary()


class _Step:
    """The one whose rows are being handed out."""

    weight_factor: Tensor | None = None


def weight_factor() -> Tensor | None:
    """fp32 scalar on the device: what multiplies the data's weights in this step; None: 1."""
    return _Step.weight_factor


def next_rows(iterator: Iterator[Rows], training: bool) -> Rows:
    """The next micro-batch's rows, on the host; all of the step are read where training needs it.

    Collective over the data-parallel group at the first micro-batch of such a step.
    """
    if not (training and (moe_losses.is_installed() or settings().weighs_normalizer)):
        return next(iterator)
    queue = _waiting.setdefault(iterator, deque())
    if not queue:
        queue.extend([next(iterator) for _ in range(get_num_microbatches())])
        tokens, weights, micro_batches = _sums(queue)
        if moe_losses.is_installed():
            moe_losses.set_tokens(tokens / micro_batches)
        if settings().weighs_normalizer:
            _Step.weight_factor = torch.where(weights > 0, tokens / weights, 0.0)
    return queue.popleft()


def _sums(step: deque[Rows]) -> Tensor:
    """fp32 [3] on the device, of all replicas: supervised tokens, their weights, micro-batches."""
    tokens = sum(float(rows["loss_mask"].sum()) for rows in step)
    weights = sum(float(rows.get("token_weights", rows["loss_mask"]).sum()) for rows in step)
    sums = torch.tensor([tokens, weights, len(step)], dtype=torch.float32, device="cuda")
    dist.all_reduce(sums, group=mpu.get_data_parallel_group())
    return sums
