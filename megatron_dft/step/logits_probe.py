"""What the loss function needs of the logits and the cross entropy does not give.

The training loop's loss function sees the cross entropy alone. The probe reads the logits a moment
before Megatron's cross entropy overwrites them: whether the target is the model's first choice (the
largest logit and the target's, one all-reduce for both), and the statistics that an entropy-based
objective asks for. Or it takes all of that and the cross entropy from one read of its own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.cross_entropy import vocab_parallel_cross_entropy
from megatron_dft.losses.registry import Objective
from megatron_dft.losses.token_stats import VOCABULARY_STATISTICS, TokenStats
from megatron_dft.losses.vocab_parallel import VocabStatistics, vocab_parallel_statistics


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


class LogitsProbe:
    """Probes each micro-batch of a last stage's GPTModel, on which it hangs as `dft_probe`.

    Args:
        model: GPTModel with an output layer, unwrapped; its compute_language_model_loss is changed.
        objective: decides which statistics are taken. weigh_mtp: whether it weighs the losses of
            multi-token prediction heads too. own: our cross entropy in the place of Megatron's.

    Attributes:
        mask: [b, s], non-zero where the micro-batch to come is supervised; None: everywhere.
        reference_logits: [b, s, V/tp] of a frozen model for the micro-batch to come, or None. With
            them the cross entropy comes from the same pass as the KL: Megatron's would overwrite
            the logits that the KL's backward needs.
    """

    def __init__(
        self, model: Any, objective: Objective, weigh_mtp: bool = False, own: bool = False
    ) -> None:
        self.mask: Tensor | None = None
        self.reference_logits: Tensor | None = None
        self._own = own
        self._model, self._objective, self._weigh_mtp = model, objective, weigh_mtp
        self._found: dict[str, Tensor] = {}
        self._wanted = {n: True for n in VOCABULARY_STATISTICS if n in objective.needs}
        self._plain = model.compute_language_model_loss

        def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
            loss = self._own_cross_entropy if self._own else self._cross_entropy
            return loss(labels, logits)

        # compat.loop.separate_mtp_losses looks for it there.
        compute_language_model_loss.for_mtp = self._mtp_loss  # type: ignore[attr-defined]
        model.compute_language_model_loss = compute_language_model_loss
        model.dft_probe = self

    def take(self) -> dict[str, Tensor]:
        """What was found in the micro-batch that the model has just seen.

        `correct` bool [b, s], `kl` fp32 [b, s] with a gradient, and the objective's statistics;
        nothing where the logits were not seen (--loss-chunk-size).
        """
        found, self._found = self._found, {}
        self.reference_logits = self.mask = None
        return found

    def _statistics(self, labels: Tensor, logits: Tensor) -> VocabStatistics:
        return vocab_parallel_statistics(
            logits.transpose(0, 1),
            labels,
            self._model.pg_collection.tp,
            reference_logits=self.reference_logits,
            reference_share=self._objective.reference_share,
            **self._wanted,
        )

    def _cross_entropy(self, labels: Tensor, logits: Tensor) -> Tensor:
        """In the place of Megatron's: labels int64 [b, s], logits [s, b, V/tp] → fp32 [b, s]."""
        found = {"correct": first_choice(logits, labels, self._model.pg_collection.tp)}
        training, cross_entropy = self._model.training, None
        if training and self.reference_logits is not None:
            seen = self._statistics(labels, logits)
            assert seen.kl is not None
            found["kl"], cross_entropy = seen.kl, -seen.log_prob
        elif training and self._wanted:
            with torch.no_grad():
                seen = self._statistics(labels, logits)
        if training:
            found.update({name: getattr(seen, name) for name in self._wanted})
        self._found = found
        return self._plain(labels, logits) if cross_entropy is None else cross_entropy

    def _own_cross_entropy(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As `_cross_entropy`, all of it from one read; 0 where not supervised. Logits are lost."""
        training = self._model.training
        reference = self.reference_logits if training else None
        cross_entropy, seen = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1),
            self._model.pg_collection.tp,
            mask=None if self.mask is None else self.mask.transpose(0, 1),
            reference_logits=reference.transpose(0, 1)
            if training and reference is not None
            else None,
            reference_share=self._objective.reference_share,
            **(self._wanted if training else {}),
        )
        found = {"correct": seen.is_top1.transpose(0, 1)}
        if seen.kl is not None:
            found["kl"] = seen.kl.transpose(0, 1)
        if training:
            found.update({n: getattr(seen, n).detach().transpose(0, 1) for n in self._wanted})
        self._found = found
        return cross_entropy.transpose(0, 1).contiguous()

    def _mtp_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        cross_entropy = self._plain(labels, logits)
        if not (self._weigh_mtp and self._model.training):
            return cross_entropy
        return self._objective(TokenStats(-cross_entropy.float(), mask=labels >= 0)).loss
