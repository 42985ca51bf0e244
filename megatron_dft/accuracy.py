"""Token accuracy on vocabulary shards: is the target the model's first choice?

The training loop's loss function sees the cross entropy alone. This reads the logits a moment
before Megatron's cross entropy overwrites them: the largest logit and the target's, one all-reduce
for both.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def first_choice(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """bool [b, s]: whether the target's logit is the largest of the whole vocabulary.

    Args:
        logits: vocabulary shard [s, b, V/tp], equal shards in rank order; not changed.
        labels: int64 [b, s].
        group: the tensor-parallel group.
    """
    local = logits.shape[-1]
    target = labels.transpose(0, 1) - group.rank() * local
    mine = (target >= 0) & (target < local)
    chosen = logits.gather(-1, torch.where(mine, target, 0).unsqueeze(-1)).squeeze(-1)
    pair = torch.stack([logits.amax(-1), chosen.masked_fill(~mine, float("-inf"))]).float()
    if group.size() > 1:
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
    largest, of_target = pair.unbind(0)
    return (of_target >= largest).transpose(0, 1)


def watch(model: Any) -> None:
    """Leave `first_choice` of each micro-batch in `model.dft_correct` (a last stage's GPTModel)."""
    plain = model.compute_language_model_loss

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        model.dft_correct = first_choice(logits, labels, model.pg_collection.tp)
        return plain(labels, logits)

    model.compute_language_model_loss = compute_language_model_loss
