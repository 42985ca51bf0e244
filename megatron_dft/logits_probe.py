"""What the loss function needs of the logits and the cross entropy does not give.

The training loop's loss function sees the cross entropy alone. The probe reads the logits a moment
before Megatron's cross entropy overwrites them: whether the target is the model's first choice (the
largest logit and the target's, one all-reduce for both), and the statistics that an entropy-based
objective asks for.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.registry import Objective
from megatron_dft.losses.vocab_parallel import vocab_parallel_statistics

# Fields of TokenStats that come from the whole distribution over the vocabulary.
VOCABULARY_STATISTICS = ("entropy", "entropy_top20", "sum_sq_prob")


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


def install(model: Any, objective: Objective) -> None:
    """Probe each micro-batch of a last stage's GPTModel; `take` returns what was found.

    `dft_correct`: bool [b, s]; `dft_statistics`: name → fp32 [b, s], in training only.
    """
    model.dft_found = {}
    plain = model.compute_language_model_loss
    wanted = [name for name in VOCABULARY_STATISTICS if name in objective.needs]

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        group = model.pg_collection.tp
        found: dict[str, Tensor] = {"correct": first_choice(logits, labels, group)}
        if wanted and model.training:
            with torch.no_grad():
                statistics = vocab_parallel_statistics(
                    logits.transpose(0, 1), labels, group, **dict.fromkeys(wanted, True)
                )
            found.update({name: getattr(statistics, name) for name in wanted})
        model.dft_found = found
        return plain(labels, logits)

    model.compute_language_model_loss = compute_language_model_loss


def take(model: Any) -> dict[str, Tensor]:
    """What the probe found in the micro-batch that the model has just seen."""
    found, model.dft_found = model.dft_found, {}
    return found
