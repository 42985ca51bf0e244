"""Megatron's loss function: token losses of either route in, the sum, the count and the report out.

Shapes, per rank: b micro-batch, s = seq_length / context-parallel size.
"""

from typing import Any

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor

from megatron_dft.flags.settings import settings
from megatron_dft.losses import registry
from megatron_dft.losses.pairs import pair_figures
from megatron_dft.losses.registry import Objective
from megatron_dft.losses.report import CROSS_ENTROPY, StepFigures, loss_report, token_figures
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.step.batch import MicroBatch

PLAIN = registry.get("sft")
# What training steps report beside the cross entropy; training/output.py reads it.
FIGURES = StepFigures()
# Names of the items of --train-data, for the losses of each; training/data_provider.py fills it.
SOURCES: list[str] = []
VALID_SOURCES: list[str] = []  # of --valid-data
# log-sum-exp minus a logit: a fused kernel may round it below 0 by the last bits of its logits.
_ROUNDING = 0.01


def token_loss(
    batch: MicroBatch,
    output_tensor: Tensor,
    found: dict[str, Tensor],
    objective: Objective,
    kl_coeff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, weight), fp32 [b, s] each; the loss is plain in evaluation.

    found: what the LogitsProbe saw, without `correct`.
    """
    if batch.head is not None:  # the output processor has done it
        return output_tensor, batch.head.cross_entropy, batch.head.weight
    cross_entropy = output_tensor.float()
    # A weighted loss is not monotone in p: checkpoints may not be chosen by it.
    chosen = objective if batch.training else PLAIN
    stats = TokenStats(
        log_prob=-cross_entropy, mask=batch.loss_mask, **batch.token_stats(), **found
    )
    loss, weight = chosen(stats)
    if batch.training and kl_coeff:
        loss = loss + kl_coeff * torch.where(batch.loss_mask.bool(), found["kl"], 0.0)
    return loss, cross_entropy, weight


def loss_func(
    batch: MicroBatch, output_tensor: Tensor, model: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the objective over this rank's supervised tokens, their number, and the report.

    Args:
        output_tensor: per token, fp32 [b, s]: the cross entropy, or of the head the objective's
            loss.
        model: the (wrapped) model chunk, with its LogitsProbe.

    Returns: the contract of Megatron's schedules (core/pipeline_parallel/schedules.py,
    forward_step_calc_loss): loss, int32 token count, name → [sum, count]. Of an objective of pairs
    their number is in the tokens' place: Megatron divides the gradient by the sum of them.
    """
    found = unwrap_model(model).dft_probe.take()
    correct = found.pop("correct", None)
    if batch.head is not None:
        correct, found = batch.head.correct, {"kl": batch.head.kl}
    per_token, cross_entropy, weight = token_loss(
        batch, output_tensor, found, settings().objective, get_args().kl_coeff
    )
    if batch.training and batch.token_weights is not None:
        # The data's own factors; the loss is then divided by the number of supervised tokens.
        per_token = per_token * batch.token_weights
    loss = per_token.sum()
    _stop_on_bad_loss(loss, cross_entropy, batch.loss_mask)
    compared = (correct, found.get("kl"), batch.ends)
    figures = (cross_entropy, per_token, weight, batch.loss_mask, *compared)
    items = SOURCES if batch.training else VALID_SOURCES
    sources = None if batch.source_ids is None else (batch.source_ids, items)
    count = batch.loss_mask.sum().to(torch.int)
    objective, pairs = settings().objective, None
    if objective.entry.per_pair:
        pairs = _pairs(batch, cross_entropy, objective)
    if not batch.training:
        if pairs is not None:  # of a rejected answer a cross entropy says nothing
            figures = (*figures[:3], _of_chosen(batch), *compared)
        return loss, count, loss_report(None, *figures, sources=sources, pairs=pairs)
    if pairs is not None:
        count = pairs[1].to(torch.int)
    names, sums = token_figures(objective.name, *figures, sources=sources, pairs=pairs)
    FIGURES.add(names, sums)
    # Megatron reduces each key of the report over all ranks in each step: this one alone is given.
    report = {CROSS_ENTROPY: sums[[names.index(CROSS_ENTROPY), -1]]}
    return loss, count, report


def _pairs(
    batch: MicroBatch, cross_entropy: Tensor, objective: Objective
) -> tuple[dict[str, Tensor], Tensor]:
    """(name → sum over the pairs, their number), 0 on all but the first context-parallel rank:
    each knows every pair, and Megatron adds up what they say."""
    stats = TokenStats(-cross_entropy.detach(), batch.loss_mask, **batch.token_stats())
    sums, number = pair_figures(stats, **objective.values)
    if mpu.get_context_parallel_rank() > 0:
        return {name: torch.zeros_like(value) for name, value in sums.items()}, number * 0
    return sums, number


def _of_chosen(batch: MicroBatch) -> Tensor:
    """The loss mask [b, s] of the preferred answers alone."""
    segments = batch.token_stats()["segment_ids"]
    return torch.where(segments % 2 == 0, batch.loss_mask, 0.0)


def checked(loss: Tensor, cross_entropy: Tensor, mask: Tensor) -> Tensor:
    """The loss, or NaN where a supervised token's cross entropy is none: inf, NaN or negative.

    An objective may hide it: its weight is 0 where p is, and 0 · inf counts as 0. Scalar, detached;
    stays on the device.
    """
    possible = (cross_entropy >= -_ROUNDING) & (cross_entropy < torch.inf)
    impossible = (mask.bool() & ~possible).any()
    return torch.where(impossible, torch.nan, loss.detach())


def _stop_on_bad_loss(loss: Tensor, cross_entropy: Tensor, mask: Tensor) -> None:
    """Megatron's own check: a NaN or inf loss ends the job before it reaches the weights."""
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    machine = get_rerun_state_machine()
    found = checked(loss, cross_entropy, mask)
    nan = "NaN in the local loss, or a supervised token whose cross entropy is inf, NaN or negative"
    for test, word in ((torch.isnan, nan), (torch.isinf, "inf in the local loss")):
        machine.validate_result(
            result=found,
            rejection_func=test,
            message=f"found {word}",
            tolerance=0.0,
            fatal=True,
        )
