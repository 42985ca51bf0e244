"""The Megatron model of a checkpoint without its weights: names, shapes and torch_dist keys.

One process, no GPU: every parameter lives on torch's meta device, so a model of any size costs
nothing. The offline converters walk it to learn what goes where.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.training.argument_utils import _apply_yarn_config_from_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_dft.compat import safe_load
from megatron_dft.compat.hooks import wrapped
from megatron_dft.hf.config import apply_to_model_config, megatron_args
from megatron_dft.hf.keys import with_te_keys
from megatron_dft.hf.parameters import Shard, shards
from megatron_dft.hf.source import HFCheckpoint

# argparse destinations whose TransformerConfig field has another name
_RENAMED = {"num_experts": "num_moe_experts", "swiglu": "gated_linear_unit"}

# What Megatron's checkpointing passes down when it saves torch_dist: it decides the keys.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Megatron's process groups with this process alone; nothing is left behind.

    Checkpoints are read by compat/safe_load.py from here on.
    """
    safe_load.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build(checkpoint: HFCheckpoint, device: str = "meta") -> torch.nn.Module:
    """The GPTModel of `checkpoint`, one stage, not sharded, its vocabulary not padded."""
    a = megatron_args(checkpoint)
    config_class = MLATransformerConfig if a.get("multi_latent_attention") else TransformerConfig
    fields = config_class.__dataclass_fields__
    settings = {_RENAMED.get(k, k): v for k, v in a.items()}
    transformer = config_class(
        **{k: v for k, v in settings.items() if k in fields},
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="local",
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    yarn = {"multi_latent_attention": False, "mscale": 1.0, "mscale_all_dim": 0.0}
    _apply_yarn_config_from_args(transformer, Namespace(**(yarn | a)))
    model_config = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=layer_spec,
        vocab_size=a["vocab_size"],
        seq_length=a["max_position_embeddings"],
        position_embedding_type=a["position_embedding_type"],
        rotary_base=a["rotary_base"],
        rotary_percent=a["rotary_percent"],
        rope_scaling=a.get("use_rope_scaling", False),
        seq_len_interpolation_factor=a.get("rotary_seq_len_interpolation_factor"),
        share_embeddings_and_output_weights=not a["untie_embeddings_and_output_weights"],
    )
    apply_to_model_config(model_config, checkpoint)
    if device == "meta":  # Megatron's local norm refuses it, and a skeleton computes nothing
        transformer.layernorm_zero_centered_gamma = False
    with torch.device(device), _tables_on(device):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return model_config.get_builder_cls()(model_config).build_model(groups)


def _tables_on(device: str) -> contextlib.AbstractContextManager[None]:
    """Megatron puts rotary tables on torch.cuda.current_device(); here no GPU is needed."""

    def make(original: Any) -> Any:
        return lambda: torch.device(device)

    return wrapped("torch.cuda:current_device", make)


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """Megatron's local spec, for a model that need not compute, with Transformer Engine's keys."""
    own = getattr(config, "own_layers", None)
    lacking = config.multi_latent_attention or (own is not None and own.attention_softcap)
    spec = with_te_keys(default_layer_spec(config, vp_stage), config)
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = layer.submodules.self_attention.submodules
        if attention.core_attention is DotProductAttention and lacking:
            attention.core_attention = _NoAttention
    return spec


class _NoAttention(torch.nn.Module):
    """Stands in for the local core attention, which lacks latent attention and soft caps.

    It has no parameters either way; a skeleton computes nothing.
    """

    takes_logit_softcap = True

    def __init__(self, **_: Any) -> None:
        super().__init__()


def with_groups(content: dict[str, Any]) -> dict[str, Any]:
    """`content_metadata` of a checkpoint as sharded_state_dict wants it."""
    return {**content, "dp_cp_group": parallel_state.get_data_parallel_group(True)}


@dataclass(frozen=True)
class Box:
    """Rows `first_row:first_row + rows` of a parameter, and where torch_dist keeps them.

    tensor     Megatron's description: key, global shape and offset (layer axis first, if any)
    shard      the parameter and its Hugging Face tensors
    """

    tensor: ShardedTensor
    shard: Shard
    first_row: int

    @property
    def rows(self) -> int:
        return self.tensor.local_shape[0]


def walk(
    model: torch.nn.Module, checkpoint: HFCheckpoint, content: dict[str, Any]
) -> tuple[list[Box], list[ShardedObject]]:
    """Everything torch_dist holds of `model`: its tensors, and the objects beside them.

    content: the `content_metadata` of the torch_dist checkpoint (see CONTENT).
    """
    state = model.sharded_state_dict(metadata=with_groups(content))
    apply_factories(state)
    by_storage = {_storage(s.parameter): s for s in shards([model], checkpoint)}
    boxes, objects = [], []
    for entry in nested_values(state):
        if isinstance(entry, ShardedObject):
            objects.append(entry)
            continue
        shard = by_storage[_storage(entry.data)]
        row_size = shard.parameter[0].numel()
        first, rest = divmod(entry.data.storage_offset(), row_size)
        assert rest == 0 and entry.data.is_contiguous(), f"{entry.key}: not a run of rows"
        boxes.append(Box(entry, shard, first))
    return boxes, objects


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
