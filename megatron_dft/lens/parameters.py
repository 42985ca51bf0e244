"""A Megatron model's parameters for `UpdateTracker`: who counts which element, and its label."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from megatron_dft.lens.tracker import TrackedParameter

EMBEDDING, HEAD, OTHER = "embedding", "head", "other"
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


def layer_labels(num_layers: int, groups: int = 4) -> list[str]:
    """The label of each global layer: at most `groups` runs of about equal length."""
    groups = min(groups, num_layers)
    labels = []
    for layer in range(num_layers):
        group = layer * groups // num_layers
        first = -(-group * num_layers // groups)
        last = -(-(group + 1) * num_layers // groups) - 1
        labels.append(f"layers-{first}-{last}" if last > first else f"layer-{first}")
    return labels


def all_labels(num_layers: int, groups: int = 4) -> list[str]:
    """Every label that `tracked_parameters` gives, in the model's order; the same on all ranks."""
    return [EMBEDDING, *dict.fromkeys(layer_labels(num_layers, groups)), HEAD, OTHER]


def tracked_parameters(
    models: list[torch.nn.Module], num_layers: int, vocab_size: int, groups: int = 4
) -> Iterator[TrackedParameter]:
    """The parameters of this rank's model chunks (GPTModel, bare or wrapped).

    num_layers and vocab_size are the whole model's, vocab_size without Megatron's padding: padded
    rows are in no exported checkpoint, and they do move in training.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared
    from megatron.core.utils import unwrap_model

    labels = layer_labels(num_layers, groups)
    dense = mpu.get_data_parallel_group(with_context_parallel=True)
    for chunk in models:
        model = unwrap_model(chunk)
        for name, tensor in model.named_parameters():
            is_expert = not getattr(tensor, "allreduce", True)
            elements = None
            if name.endswith(_VOCABULARY):
                first = mpu.get_tensor_model_parallel_rank() * tensor.shape[0]
                rows = min(max(vocab_size - first, 0), tensor.shape[0])
                elements = rows * tensor.shape[1]
            yield TrackedParameter(
                tensor=tensor,
                label=_label(model, name, labels),
                counted=param_is_not_shared(tensor)
                and param_is_not_tensor_parallel_duplicate(
                    tensor,
                    tp_group=mpu.get_tensor_model_parallel_group(),
                    expert_tp_group=mpu.get_expert_tensor_parallel_group(),
                ),
                replicas=mpu.get_expert_data_parallel_group() if is_expert else dense,
                elements=elements,
            )


def _label(model: Any, name: str, labels: list[str]) -> str:
    if match := _LAYER.search(name):
        # Names count the layers of this chunk; the layer itself knows its place in the model.
        return labels[model.decoder.layers[int(match.group(1))].layer_number - 1]
    if "embedding" in name:
        return EMBEDDING
    return HEAD if "output_layer" in name else OTHER


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers that a Megatron optimizer steps; each takes an `anchor.L2SP` of its own.

    With the distributed optimizer their parameters are this rank's float32 shards. Raises
    ValueError where they hold no float32 master weights that a hook could move.
    """
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    found = []
    for member in members:
        inner = getattr(member, "optimizer", None)
        if inner is None:  # a rank without parameters of this kind (experts, say)
            continue
        if getattr(member.config, "use_precision_aware_optimizer", False):
            raise ValueError(
                "--l2sp-coeff: --use-precision-aware-optimizer keeps the master weights inside "
                "its fused step, where no anchor can reach them; leave one of the two out"
            )
        if getattr(member.config, "optimizer_cpu_offload", False):
            raise ValueError(
                "--l2sp-coeff: --optimizer-cpu-offload steps copies of the weights, which an "
                "anchor would not move; leave one of the two out"
            )
        found.append(inner)
    return found
