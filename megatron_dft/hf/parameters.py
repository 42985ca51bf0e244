"""Walk the parameters of the model chunks that this rank holds and say which pieces make each one.

The one place that knows Megatron's module tree and its process groups; load and export share it,
and a move from GPTModel to another model class would change nothing else.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_dft.hf.families import table_of
from megatron_dft.hf.pieces import PADDING, Dimensions, Piece, Rule, Segment, segments, window
from megatron_dft.hf.source import HFCheckpoint

# Layer norms that a TE layer fuses into the linear after it, under the name that the local spec
# uses.
_FUSED_NORM = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
# Experts one module each (local spec), or all of a rank in one grouped linear (TE).
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<sequential>\d+)\.)?(?P<linear>linear_fc[12])"
    r"\.(?P<kind>weight|bias)(?P<grouped>\d*)"
)


@dataclass(frozen=True)
class Shard:
    """One parameter of this rank.

    name       Megatron's name in this rank's chunk
    parameter  the tensor itself
    rule       its line of the table
    runs       the whole parameter over all tensor-parallel ranks
    group      the (expert) tensor-parallel group that shards it
    is_owner   this rank is the one data-parallel replica that answers for it
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


@dataclass(frozen=True)
class _Ranks:
    """This rank's place in one set of process groups: dense layers, or experts."""

    group: dist.ProcessGroup
    is_owner: bool


def shards(models: list[torch.nn.Module], checkpoint: HFCheckpoint) -> Iterator[Shard]:
    """The parameters of this rank's model chunks, in the same order on all tensor-parallel ranks.

    Raises ValueError naming a parameter that the family's table does not know.
    """
    table = table_of(checkpoint)
    dense = _Ranks(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
    )
    experts = _Ranks(
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_rank() == 0,
    )
    for model in unwrap_model(models):
        dims = _dimensions(model.config, checkpoint)
        for name, tensor in _tensors(model):
            key, layer, expert = _key(model, name)
            if key not in table:
                raise ValueError(
                    f"Megatron built the parameter {name!r}, for which {checkpoint.architecture} "
                    "has no tensor; a model flag adds it: remove the flag that config.json does "
                    "not ask for"
                )
            ranks = dense if expert is None else experts
            rule = table[key]
            names = tuple(n.format(layer=layer, expert=expert) for n in rule.names)
            whole = checkpoint.tensors.get(names[0])
            if rule.is_optional and whole is not None and whole.shape == tuple(tensor.shape):
                rule = dataclasses.replace(rule, axis=None)
            yield _shard(name, rule, names, tensor, ranks, dims)


def _dimensions(config: TransformerConfig, checkpoint: HFCheckpoint) -> Dimensions:
    return Dimensions(
        config.num_query_groups,
        config.num_attention_heads // config.num_query_groups,
        config.kv_channels,
        checkpoint.settings["vocab_size"],
    )


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the one buffer that checkpoints carry: the router's selection bias.

    Multi-token prediction heads are in no checkpoint of these families: they start from Megatron's
    initialisation and stay out of the export.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith("mtp."):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith(".router.expert_bias"):
            yield name, buffer


def _key(model: torch.nn.Module, name: str) -> tuple[str, int | None, int | None]:
    """Name in the table, zero-based global layer and global expert of a parameter of `model`."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name, None, None
    # layer_number counts over all pipeline stages and virtual chunks, from 1.
    layer = model.decoder.layers[int(match[1])].layer_number - 1
    rest = _FUSED_NORM.get(match[2], match[2])
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        return f"layer.{rest}", layer, None
    sequential, grouped = expert["sequential"], expert["grouped"]
    here = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * here
    return (
        f"layer.mlp.experts.{expert['linear']}.{expert['kind']}",
        layer,
        first + int(grouped if sequential is None else sequential),
    )


def _shard(
    name: str,
    rule: Rule,
    names: tuple[str, ...],
    tensor: torch.Tensor,
    ranks: _Ranks,
    dims: Dimensions,
) -> Shard:
    count = 1 if rule.axis is None else ranks.group.size()
    size = tensor.shape[rule.axis or 0] * count
    runs = segments(rule, names, size, count, dims)
    return Shard(name, tensor, rule, runs, ranks.group, ranks.is_owner)


def row_pieces(shard: Shard, begin: int, end: int) -> list[Piece]:
    """Pieces of the rows `begin:end` of an unsharded parameter, counted from `begin`."""
    if shard.rule.axis == 1:  # unsharded, all columns are there: rows are runs too
        return [Piece(shard.runs[0].name, begin, 0, end - begin)]
    return window(shard.runs, begin, end)
