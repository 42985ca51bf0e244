"""Fill a Megatron model's shards from a Hugging Face checkpoint, each rank reading only its own."""

from collections import Counter

import torch

from megatron_dft.hf.collective import raise_together
from megatron_dft.hf.consumption import (
    check_all_consumed,
    check_finite,
    check_shapes,
    check_tied_copy,
    count,
)
from megatron_dft.hf.parameters import Shard, shards
from megatron_dft.hf.pieces import PADDING
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.safetensors import Reader


def load_hf_weights(
    models: list[torch.nn.Module], checkpoint: HFCheckpoint
) -> list[torch.nn.Module]:
    """Collective. Copy `checkpoint` into the model chunks of this rank, in place, and return them.

    models: this rank's GPTModel chunks (several under virtual pipelining), bare or wrapped in
    Megatron's Float16Module and DDP; on CPU or GPU; the dtype of each parameter is kept. As a
    Megatron pre-wrap hook: `functools.partial(load_hf_weights, checkpoint=checkpoint)`.

    A rank reads the bytes of its own shards and never holds more than 32 MiB beyond them. Padded
    vocabulary rows become zero. Over all ranks each tensor of the checkpoint is consumed exactly
    once. Raises one ValueError on all ranks naming the tensor that is missing, extra, of the wrong
    shape, or holds a NaN.
    """
    error: Exception | None = None
    consumed: Counter[str] = Counter()
    try:
        with Reader() as reader, torch.no_grad():
            for shard in shards(models, checkpoint):
                _fill(shard, checkpoint, reader)
                if shard.is_owner and not shard.rule.is_copy:
                    count(shard, checkpoint, consumed)
            check_tied_copy(checkpoint, reader)
    except Exception as e:
        error = e
    raise_together(error)
    check_all_consumed(checkpoint, consumed)
    return models


def _fill(shard: Shard, checkpoint: HFCheckpoint, reader: Reader) -> None:
    target = shard.parameter.data
    if target.is_meta:
        raise ValueError(
            "--init-model-with-meta-device leaves no memory to load --hf-model into; remove that "
            "flag"
        )
    check_shapes(shard, checkpoint)
    for piece in shard.pieces(shard.group.rank()):
        region = target.narrow(shard.axis, piece.target, piece.length)
        if piece.name == PADDING:
            region.zero_()
            continue
        info = checkpoint.tensors[piece.name]
        columns = shard.axis == 1
        start, stop = (0, info.shape[0]) if columns else (piece.source, piece.source + piece.length)
        for first, rows in reader.blocks(info, start, stop):
            if columns:
                rows = rows.narrow(1, piece.source, piece.length)
            check_finite(piece.name, rows, checkpoint)
            region.narrow(0, first - start, rows.shape[0]).copy_(rows)
