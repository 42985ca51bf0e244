"""Route 2 of the loss: hidden states → loss without the logits, as Megatron's output processor.

GPTModel.forward (since 0.18) hands the final hidden states to `output_processor` in the place of
its output layer and cross entropy. It returns the per-token loss; the figures that the report
needs are left in the micro-batch.
"""

from typing import Any

from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_dft.arguments import settings
from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss

_PLAIN = registry.get("sft")


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: dict[str, Any],
    **_: Any,
) -> Tensor:
    """Per-token loss, fp32 [b, s], 0 where not supervised; differentiable.

    Args:
        hidden_states: [s, b, h] per rank (s/tp under sequence parallelism).
        output_layer: Megatron's ColumnParallelLinear; its own weight where embeddings are untied.
        output_weight: the tied embedding [V/tp, h], or None.
        labels: int64 [b, s].
        context: the micro-batch of `forward_step.get_batch`; its `training` says whether to weigh.
            It gets `cross_entropy` and `token_weight`, fp32 [b, s], and `correct`, bool [b, s].
    """
    out = linear_head_loss(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        labels,
        objective=settings().objective if context["training"] else _PLAIN,
        mask=context["loss_mask"],
        group=mpu.get_tensor_model_parallel_group(),
        sequence_parallel=output_layer.sequence_parallel,
        chunk_size=get_args().loss_chunk_size,
        vocab_size=settings().vocab_size,
        stats=context["stats"] if context["training"] else None,
    )
    context["cross_entropy"], context["token_weight"] = -out.log_prob, out.weight
    context["correct"] = out.is_top1
    return out.loss
