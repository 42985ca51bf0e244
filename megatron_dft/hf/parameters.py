"""Walk the parameters of the model chunks that this rank holds and say which pieces make each one.

The one place that knows Megatron's module tree and its process groups; load and export share it,
and a move from GPTModel to another model class would change nothing else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dft.hf.families import table_for
from megatron_dft.hf.pieces import PADDING, Dimensions, Piece, Rule, Segment, segments, window
from megatron_dft.hf.source import HFCheckpoint

# Layer norms that a TE layer fuses into the linear after it, under the name that the local spec
# uses.
_FUSED_NORM = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Shard:
    """One parameter of this rank.

    name      Megatron's name, global layer number, one spelling for all layer specs
    parameter the tensor itself
    rule      its line of the table
    runs      the whole parameter over all tensor-parallel ranks
    axis      the axis that `runs` and `pieces` count along
    group     the tensor-parallel group that shards it
    is_owner  this rank is the one data-parallel replica that answers for it
    """

    name: str
    parameter: torch.Tensor
    rule: Rule
    runs: list[Segment]
    group: dist.ProcessGroup
    is_owner: bool

    @property
    def axis(self) -> int:
        return self.rule.axis or 0

    def pieces(self, rank: int) -> list[Piece]:
        """The pieces that tensor-parallel `rank` of the group holds."""
        size = self.parameter.shape[self.axis]
        begin = 0 if self.rule.axis is None else rank * size
        return window(self.runs, begin, begin + size)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> the shape that this parameter implies for it."""
        extent: dict[str, int] = {}
        for run in self.runs:
            if run.name != PADDING:
                extent[run.name] = max(extent.get(run.name, 0), run.start + run.length)
        shape = tuple(self.parameter.shape)
        return {n: (*shape[: self.axis], e, *shape[self.axis + 1 :]) for n, e in extent.items()}


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside Megatron's DDP and Float16Module wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def shards(models: list[torch.nn.Module], checkpoint: HFCheckpoint) -> Iterator[Shard]:
    """The parameters of this rank's model chunks, in the same order on all tensor-parallel ranks.

    Raises ValueError naming a parameter that the family's table does not know.
    """
    table = table_for(checkpoint.architecture, bool(checkpoint.settings["tie_word_embeddings"]))
    tp = parallel_state.get_tensor_model_parallel_group()
    owner = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    for model in map(unwrap, models):
        config = model.config
        dims = Dimensions(
            config.num_query_groups,
            config.num_attention_heads // config.num_query_groups,
            config.kv_channels,
            checkpoint.settings["vocab_size"],
        )
        for name, parameter in model.named_parameters():
            key, layer = _key(model, name)
            if key not in table:
                raise ValueError(
                    f"Megatron built the parameter {name!r}, for which {checkpoint.architecture} "
                    "has "
                    "no tensor; a model flag adds it: remove the flag that config.json does not "
                    "ask for"
                )
            yield _shard(key, layer, parameter, table[key], tp, owner, dims)


def _key(model: torch.nn.Module, name: str) -> tuple[str, int | None]:
    """Name in the table and zero-based global layer of a parameter of `model`."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name, None
    rest = _FUSED_NORM.get(match[2], match[2])
    # layer_number counts over all pipeline stages and virtual chunks, from 1.
    return f"layer.{rest}", model.decoder.layers[int(match[1])].layer_number - 1


def _shard(key, layer, parameter, rule, group, owner, dims) -> Shard:
    names = tuple(n.format(layer=layer) for n in rule.names)
    count = 1 if rule.axis is None else group.size()
    size = parameter.shape[rule.axis or 0] * count
    runs = segments(rule, names, size, count, dims)
    name = key if layer is None else key.replace("layer.", f"decoder.layers.{layer}.", 1)
    return Shard(name, parameter, rule, runs, group, owner)
