"""The head: hidden states → loss without the logits, as Megatron's output processor.

GPTModel.forward (since 0.18) hands the final hidden states to `output_processor` in the place of
its output layer and cross entropy. It returns the per-token loss; the figures that the report
needs are left in the micro-batch.
"""

import functools
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_dft.flags.settings import settings
from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.prior_mass import log_mass
from megatron_dft.losses.row_filter import RowFilter
from megatron_dft.losses.supervised_rows import SupervisedRows
from megatron_dft.losses.vocab_statistics import row_chunks
from megatron_dft.step.batch import HeadFigures, MicroBatch, ReferenceHead

_PLAIN = registry.get("sft")


def _wait_for_weight(output_layer: Any, hidden_states: Tensor) -> None:
    """Run what Megatron hangs before the layer's forward, which is not called here.

    Under --overlap-param-gather that waits for the layer's weight and sends for the next layer's
    (core/distributed/distributed_data_parallel.py); without it the weight of a step ago is read.
    """
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, (hidden_states,))


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: MicroBatch,
    **_: Any,
) -> Tensor:
    """Per-token loss, fp32 [b, s], 0 where not supervised; differentiable.

    Args:
        hidden_states: [s, b, h] per rank (s/tp under sequence parallelism).
        output_layer: Megatron's ColumnParallelLinear; its own weight where embeddings are untied.
        output_weight: the tied embedding [V/tp, h], or None.
        labels: int64 [b, s].
        context: the micro-batch; its `training` says whether to weigh, it gets its `head`.
    """
    _wait_for_weight(output_layer, hidden_states)
    args, route, training = get_args(), settings().route, context.training
    reference = context.reference_head if training else None
    out = linear_head_loss(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        labels,
        objective=settings().objective if training else _PLAIN,
        mask=context.supervised,
        group=mpu.get_tensor_model_parallel_group(),
        sequence_parallel=output_layer.sequence_parallel,
        chunk_size=args.loss_chunk_size,
        loss_memory=route.memory,
        vocab_size=settings().vocab_size,
        stats=context.token_stats() if training else None,
        reference_hidden=None if reference is None else reference.hidden,
        reference_weight=None if reference is None else reference.weight,
        row_filter=row_filter() if training and not context.whole_gradient else None,
        fuse_main_grad=args.gradient_accumulation_fusion,
    )
    loss = out.loss
    if training and args.kl_coeff:
        assert out.kl is not None
        loss = loss + args.kl_coeff * torch.where(context.loss_mask.bool(), out.kl, 0.0)
    context.head = HeadFigures(-out.log_prob, out.weight, out.is_top1, out.kl)
    return loss


def hidden_processor(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
) -> ReferenceHead:
    """For a frozen model: what its output layer would be given, in the place of its logits."""
    weight = output_layer.weight if output_weight is None else output_weight
    return ReferenceHead(hidden_states, weight)


@torch.no_grad()
def reference_log_prob(batch: MicroBatch, reference: ReferenceHead, output_layer: Any) -> Tensor:
    """log p of the labels under the frozen model, fp32 [b, s]."""
    return linear_head_loss(
        reference.hidden,
        reference.weight,
        batch.labels,
        objective=_PLAIN,
        mask=batch.supervised,
        group=mpu.get_tensor_model_parallel_group(),
        sequence_parallel=output_layer.sequence_parallel,
        chunk_size=get_args().loss_chunk_size,
        loss_memory=settings().route.memory,
        vocab_size=settings().vocab_size,
    ).log_prob


@torch.no_grad()
def reference_log_mass(batch: MicroBatch, reference: ReferenceHead, output_layer: Any) -> Tensor:
    """log u of prior_mass.py under the frozen model, fp32 [b, s], 0 where not supervised."""
    group, hidden = mpu.get_tensor_model_parallel_group(), reference.hidden
    supervised = batch.supervised.bool().t().flatten()
    rows = SupervisedRows(supervised, group, output_layer.sequence_parallel, hidden.device)
    states, targets = rows.gather(hidden.flatten(0, 1)), rows.of(batch.labels.t().flatten())
    found = states.new_empty(len(targets), dtype=torch.float32)
    for part in row_chunks(len(targets), len(reference.weight), None, hidden.device):
        logits = states[part] @ reference.weight.t()
        found[part] = log_mass(logits, targets[part], group, vocab_size=settings().vocab_size)
    return rows.spread(found).view(batch.labels.t().shape).t()


@functools.cache
def row_filter() -> RowFilter | None:
    """The run's --loss-row-filter, which counts what it drops; None without the flag."""
    bound = settings().route.row_filter
    return None if bound is None else RowFilter(bound)
