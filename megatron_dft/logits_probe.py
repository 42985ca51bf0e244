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
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_parallel import VocabStatistics, vocab_parallel_statistics

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


def install(model: Any, objective: Objective, weigh_mtp: bool = False) -> None:
    """Probe each micro-batch of a last stage's GPTModel; `take` returns what was found.

    In training with `model.dft_reference_logits` [b, s, V/tp] set, the cross entropy comes from the
    same pass as the KL: Megatron's would overwrite the logits that the KL's backward needs.
    """
    model.dft_found = {}
    model.dft_reference_logits = None
    plain = model.compute_language_model_loss
    wanted = {name: True for name in VOCABULARY_STATISTICS if name in objective.needs}

    def statistics(labels: Tensor, logits: Tensor) -> VocabStatistics:
        return vocab_parallel_statistics(
            logits.transpose(0, 1),
            labels,
            model.pg_collection.tp,
            reference_logits=model.dft_reference_logits,
            **wanted,
        )

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        found: dict[str, Tensor] = {"correct": first_choice(logits, labels, model.pg_collection.tp)}
        cross_entropy = None
        if model.training and model.dft_reference_logits is not None:
            seen = statistics(labels, logits)
            assert seen.kl is not None
            found["kl"], cross_entropy = seen.kl, -seen.log_prob
        elif model.training and wanted:
            with torch.no_grad():
                seen = statistics(labels, logits)
        if model.training:
            found.update({name: getattr(seen, name) for name in wanted})
        model.dft_found = found
        return plain(labels, logits) if cross_entropy is None else cross_entropy

    def mtp_loss(labels: Tensor, logits: Tensor) -> Tensor:
        cross_entropy = plain(labels, logits)
        if not (weigh_mtp and model.training):
            return cross_entropy
        return objective(TokenStats(-cross_entropy.float(), mask=labels >= 0)).loss

    compute_language_model_loss.for_mtp = mtp_loss  # type: ignore[attr-defined]
    model.compute_language_model_loss = compute_language_model_loss


def take(model: Any) -> dict[str, Tensor]:
    """What was found in the micro-batch that the model has just seen.

    `correct` bool [b, s], `kl` fp32 [b, s] with a gradient, and the objective's statistics.
    """
    found, model.dft_found = model.dft_found, {}
    model.dft_reference_logits = None
    return found
