"""Every tensor of a checkpoint fits, is finite and is consumed once, or the import fails."""

from collections import Counter

import torch
import torch.distributed as dist

from megatron_dft.hf.collective import gather
from megatron_dft.hf.families import TIED_COPY, optional_tensors
from megatron_dft.hf.parameters import Shard
from megatron_dft.hf.pieces import PADDING
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.safetensors import Reader, StoredTensor

# Others are codes of quantised weights, worth nothing without their scales.
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shapes(shard: Shard, checkpoint: HFCheckpoint) -> None:
    """Raise ValueError unless the tensors of this parameter exist, in the shapes it implies, and
    in a dtype that holds weights as they are."""
    for name, expected in shard.hf_shapes().items():
        info = _info(shard, name, checkpoint)
        shape = info.shape
        if info.dtype not in _WEIGHTS:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} is {str(info.dtype).removeprefix('torch.')} "
                f"({info.file.name}): expected float32, bfloat16 or float16; give the unquantised "
                "checkpoint, or dequantise this one"
            )
        if shape != expected:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(shape)}, but config.json and "
                f"the model flags imply {list(expected)}"
            )


def check_finite(name: str, rows: torch.Tensor, checkpoint: HFCheckpoint) -> None:
    # The maximum of anything with a NaN is NaN: one pass, no temporary, thrice as fast as isnan.
    if rows.is_floating_point() and rows.numel() and rows.amax().isnan():
        file = checkpoint.tensors[name].file.name
        raise ValueError(
            f"{checkpoint.path}: tensor {name!r} holds NaN ({file}); the checkpoint is damaged"
        )


def _info(shard: Shard, name: str, checkpoint: HFCheckpoint) -> StoredTensor:
    if name not in checkpoint.tensors:
        raise ValueError(
            f"{checkpoint.path}: tensor {name!r} is missing; {checkpoint.architecture} needs it "
            f"for {shard.name}"
        )
    return checkpoint.tensors[name]


def count(shard: Shard, checkpoint: HFCheckpoint, consumed: Counter[str]) -> None:
    """Add the elements that this rank answers for, by Hugging Face name."""
    if shard.rule.axis is None and shard.group.rank() != 0:
        return
    for piece in shard.pieces(shard.group.rank()):
        if piece.name != PADDING:
            info = checkpoint.tensors[piece.name]
            consumed[piece.name] += info.numel // info.shape[shard.axis] * piece.length


def check_tied_copy(checkpoint: HFCheckpoint, reader: Reader) -> None:
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


def check_all_consumed(checkpoint: HFCheckpoint, consumed: Counter[str]) -> None:
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
