"""Fill a Megatron model's shards from a Hugging Face checkpoint, each rank reading only its own."""

from collections import Counter

import torch
import torch.distributed as dist

from megatron_dft.hf.collective import gather, raise_together
from megatron_dft.hf.families import TIED_COPY, optional_tensors
from megatron_dft.hf.parameters import Shard, shards
from megatron_dft.hf.pieces import PADDING
from megatron_dft.hf.safetensors_io import Reader, TensorInfo
from megatron_dft.hf.source import HFCheckpoint


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
                    _count(shard, checkpoint, consumed)
            _check_tied_copy(checkpoint, reader)
    except Exception as e:
        error = e
    raise_together(error)
    _check_all_consumed(checkpoint, consumed)
    return models


def _info(shard: Shard, name: str, checkpoint: HFCheckpoint) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise ValueError(
            f"{checkpoint.path}: tensor {name!r} is missing; {checkpoint.architecture} needs it "
            f"for {shard.name}"
        )
    return checkpoint.tensors[name]


def _fill(shard: Shard, checkpoint: HFCheckpoint, reader: Reader) -> None:
    target = shard.parameter.data
    if target.is_meta:
        raise ValueError(
            "--init-model-with-meta-device leaves no memory to load --hf-model into; remove that "
            "flag"
        )
    for name, expected in shard.hf_shapes().items():
        shape = _info(shard, name, checkpoint).shape
        if shape != expected:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}, but config.json and "
                f"the model flags imply {list(expected)}"
            )
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
            if torch.isnan(rows).any():
                raise ValueError(
                    f"{checkpoint.path}: tensor {piece.name!r} holds NaN ({info.file.name}); the "
                    "checkpoint is damaged"
                )
            region.narrow(0, first - start, rows.shape[0]).copy_(rows)


def _count(shard: Shard, checkpoint: HFCheckpoint, consumed: Counter[str]) -> None:
    """Add the elements that this rank answers for, by Hugging Face name."""
    if shard.rule.axis is None and shard.group.rank() != 0:
        return
    for piece in shard.pieces(shard.group.rank()):
        if piece.name != PADDING:
            info = checkpoint.tensors[piece.name]
            consumed[piece.name] += info.numel // info.shape[shard.axis] * piece.length


def _check_tied_copy(checkpoint: HFCheckpoint, reader: Reader) -> None:
    """A tied checkpoint may repeat the embedding as lm_head.weight, which must then be the same."""
    if not checkpoint.settings["tie_word_embeddings"] or TIED_COPY not in checkpoint.tensors:
        return
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    head, embedding = checkpoint.tensors[TIED_COPY], checkpoint.tensors["model.embed_tokens.weight"]
    same = head.shape == embedding.shape and all(
        torch.equal(a, b)
        for (_, a), (_, b) in zip(
            reader.blocks(head, 0, head.shape[0]),
            reader.blocks(embedding, 0, embedding.shape[0]),
            strict=False,
        )
    )
    if not same:
        raise ValueError(
            f"{checkpoint.path}: config.json ties the output layer to the embedding "
            f"(tie_word_embeddings), but {TIED_COPY} differs from it; set tie_word_embeddings to "
            f"false if the output layer is meant, or remove {TIED_COPY}"
        )


def _check_all_consumed(checkpoint: HFCheckpoint, consumed: Counter[str]) -> None:
    total: Counter[str] = Counter()
    for part in gather(consumed):
        total.update(part)
    optional = optional_tensors(checkpoint)
    extra = [
        name
        for name, info in checkpoint.tensors.items()
        if total[name] != info.numel and name not in optional
    ]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        name = extra[0]
        raise ValueError(
            f"{checkpoint.path}: tensor {name!r}{more} fits nowhere in the Megatron model "
            f"({total[name]} of {checkpoint.tensors[name].numel} elements used); the architecture "
            f"is not the plain {checkpoint.architecture}, or a model flag contradicts config.json"
        )
