"""Route 1 of the loss: what Megatron's vocabulary-parallel cross entropy is replaced by.

Cross entropy, accuracy, entropy, Σp² and KL come from one read of the logits, and the gradient
takes their place. Megatron's own makes three all-reduces and passes a logit through memory about
ten times; it leaves neither the logits nor a statistic behind.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.vocab_parallel import VocabStatistics, vocab_parallel_statistics

_IGNORED = -100


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    mask: Tensor | None = None,
    overwrite_logits: bool = True,
    **statistics: Any,
) -> tuple[Tensor, VocabStatistics]:
    """(cross entropy [s, b], statistics): fp32, differentiable, 0 where not supervised.

    Args:
        vocab_parallel_logits: [s, b, V/tp] per rank; lost, but for `overwrite_logits=False`. No
            leaf of autograd, as the output of a model is none.
        target: int64 [s, b], ids in the whole vocabulary, the same on each rank.
        tp_group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        mask: [s, b], non-zero where supervised: other tokens' logits are not read. None: all are.
        statistics: entropy, entropy_top20, sum_sq_prob (bool), reference_logits, vocab_size, … of
            `vocab_parallel_statistics`.

    >>> logits = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]], requires_grad=True)
    >>> loss, found = vocab_parallel_cross_entropy(logits * 1, torch.tensor([[0], [1]]))
    >>> loss.detach(), found.is_top1
    (tensor([[0.2395],
            [1.5514]]), tensor([[ True],
            [False]]))
    >>> loss.sum().backward(); logits.grad[0]
    tensor([[-0.2130,  0.1065,  0.1065]])
    """
    if mask is not None:
        target = torch.where(mask.to(torch.bool), target, _IGNORED)
    found = vocab_parallel_statistics(
        vocab_parallel_logits,
        target,
        tp_group,
        overwrite_logits=overwrite_logits,
        ignore_index=_IGNORED,
        **statistics,
    )
    return -found.log_prob, found
