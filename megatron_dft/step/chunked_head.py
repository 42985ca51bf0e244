"""Route 2 of the loss: hidden states → loss without the logits, as Megatron's output processor.

GPTModel.forward (since 0.18) hands the final hidden states to `output_processor` in the place of
its output layer and cross entropy. It returns the per-token loss; the figures that the report
needs are left in the micro-batch.
"""

from typing import Any

from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_dft.flags.settings import settings
from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.step.batch import HeadFigures, MicroBatch

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
    out = linear_head_loss(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        labels,
        objective=settings().objective if context.training else _PLAIN,
        mask=context.loss_mask,
        group=mpu.get_tensor_model_parallel_group(),
        sequence_parallel=output_layer.sequence_parallel,
        chunk_size=get_args().loss_chunk_size,
        vocab_size=settings().vocab_size,
        stats=context.token_stats() if context.training else None,
    )
    context.head = HeadFigures(-out.log_prob, out.weight, out.is_top1)
    return out.loss
