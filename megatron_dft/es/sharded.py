"""The same perturbation on a Megatron model's shards, whatever the layout."""

from __future__ import annotations

import torch

from megatron_dft.es.noise import normal
from megatron_dft.hf.parameters import Shard, shards
from megatron_dft.hf.pieces import PADDING
from megatron_dft.hf.source import HFCheckpoint


@torch.no_grad()
def perturb(
    models: list[torch.nn.Module], checkpoint: HFCheckpoint, seed: int, scale: float
) -> None:
    """Add scale · ε(seed) to this rank's parameters, in place; no communication.

    models: this rank's GPTModel chunks, bare or wrapped; checkpoint: the model's Hugging Face form,
    by whose tensor names and element places the noise is drawn, so that it is `Weights.perturb`'s
    at every tensor, pipeline, expert and data parallel size. Padded vocabulary rows stay. scale: σ
    to perturb, −σ to take it back up to rounding, α/N · Z of a member to update.
    """
    for shard in shards(models, checkpoint):
        # A router's selection bias is a buffer, in transformers too.
        if isinstance(shard.parameter, torch.nn.Parameter):
            _perturb(shard, checkpoint, seed, scale)


def _perturb(shard: Shard, checkpoint: HFCheckpoint, seed: int, scale: float) -> None:
    for piece in shard.pieces(shard.group.rank()):
        if piece.name == PADDING:
            continue
        region = shard.parameter.data.narrow(shard.axis, piece.target, piece.length)
        part = range(piece.source, piece.source + piece.length)
        shape = checkpoint.tensors[piece.name].shape
        if len(shape) == 1:
            rows, columns = range(1), part
        else:
            whole = torch.Size(shape[1:]).numel()
            rows, columns = (range(shape[0]), part) if shard.axis else (part, range(whole))
        noise = normal(seed, piece.name, rows, columns, region.device)
        region += noise.mul_(scale).reshape(region.shape)
