"""Write the shards of a Megatron model as a Hugging Face checkpoint, each stage its own files."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dft.hf import directory
from megatron_dft.hf.collective import gather, raise_together
from megatron_dft.hf.companions import TrainedChat
from megatron_dft.hf.parameters import Shard, shards
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.safetensors_writer import Writer

MAX_FILE_BYTES = 5 * 10**9

# One file: Hugging Face name -> (shape, dtype)
_Contents = dict[str, tuple[tuple[int, ...], torch.dtype]]


def save_hf(
    models: list[torch.nn.Module],
    checkpoint: HFCheckpoint,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: str | None = None,
    chat: TrainedChat | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Collective. Write the model as a Hugging Face directory that transformers loads; returns it.

    models      this rank's GPTModel chunks, bare or wrapped. With --overlap-param-gather the
                parameters
                must have been gathered (Megatron's `disable_forward_pre_hook(param_sync=True)`).
    checkpoint  the base model: gives config.json, tokenizer, names, and the dtypes
    out_dir     on a file system that every rank sees; must not exist or be empty unless `overwrite`
    dtype       of all tensors; None keeps each tensor's dtype in the base checkpoint
    card        README.md (see `card.model_card`)
    chat        the template and the end tokens of the trained answers; None keeps the base's

    The tensor-parallel rank 0 of each pipeline stage (and of each expert-parallel rank for experts)
    writes what it owns, tensor by tensor: no process holds more than its shard and one whole
    tensor. The directory appears by one rename, complete and flushed; a killed export leaves a
    hidden `.NAME.incomplete`, which the next one removes. If one rank fails, all raise its error.
    """
    out = directory.target(out_dir)
    staging = directory.staging_path(out)
    raise_together(_attempt(lambda: _on_rank0(lambda: directory.start(checkpoint, out, overwrite))))
    raise_together(_attempt(lambda: _check_visible(staging)))
    owned: list[Shard] = []
    plan: list[_Contents] = []

    def make_plan() -> None:
        owned.extend(s for s in shards(models, checkpoint) if s.is_owner and not s.rule.is_copy)
        plan.extend(plan_files(owned, checkpoint, dtype, max_file_bytes))

    raise_together(_attempt(make_plan))
    counts = [len(p) for p in gather([None] * len(plan))]
    files = file_names(sum(counts))
    first = sum(counts[: dist.get_rank()])
    raise_together(_write(owned, plan, [staging / f for f in files[first : first + len(plan)]]))
    raise_together(
        _attempt(
            lambda: _on_rank0(
                lambda: directory.finish(
                    checkpoint, staging, out, files, dtype=dtype, card=card, chat=chat
                )
            )
        )
    )
    return out


def _attempt(action) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def _on_rank0(action) -> None:
    if dist.get_rank() == 0:
        action()


def _check_visible(staging: Path) -> None:
    if not staging.is_dir():
        raise ValueError(
            f"--save-hf: rank {dist.get_rank()} does not see {staging}, which rank 0 made; name a "
            "directory on a file system that all nodes share"
        )


def file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def plan_files(
    owned: list[Shard],
    checkpoint: HFCheckpoint,
    dtype: torch.dtype | None,
    max_file_bytes: int,
) -> list[_Contents]:
    """The files that this rank writes: whole tensors, in the order of its parameters."""
    files: list[_Contents] = []
    room = 0
    for shard in owned:
        if shard.group.rank() != 0:
            continue
        for name, shape in shard.hf_shapes().items():
            kind = dtype or checkpoint.tensors[name].dtype
            nbytes = kind.itemsize * torch.Size(shape).numel()
            if not files or nbytes > room:
                files.append({})
                room = max_file_bytes
            files[-1][name] = (shape, kind)
            room -= nbytes
    return files


def _write(owned: list[Shard], plan: list[_Contents], paths: list[Path]) -> Exception | None:
    """Gather and write what is owned; returns the error instead of leaving the collectives."""
    error: Exception | None = None
    writers: list[Writer] = []
    place: dict[str, tuple[Writer, torch.dtype]] = {}
    try:
        for path, contents in zip(paths, plan, strict=True):
            writers.append(Writer(path, contents))
            place.update({name: (writers[-1], kind) for name, (_, kind) in contents.items()})
    except Exception as e:
        error = e
    for shard in owned:
        parts = _gather_parts(shard)
        if parts is None or error is not None:
            continue
        try:
            for name, tensor in _assemble(shard, parts):
                writer, kind = place[name]
                writer.write(name, tensor.to(kind))
        except Exception as e:
            error = e
    for writer in writers:
        try:
            writer.close() if error is None else writer.abandon()
        except Exception as e:
            error = e
    return error


def _gather_parts(shard: Shard) -> list[torch.Tensor] | None:
    """All tensor-parallel ranks' shards of the parameter, on rank 0 of the group; else None."""
    local = shard.parameter.detach().contiguous()
    rank = shard.group.rank()
    if shard.rule.axis is None or shard.group.size() == 1:
        return [local] if rank == 0 else None
    # As bytes: gloo and NCCL move them unchanged whatever the dtype.
    local_bytes = local.view(torch.uint8)
    parts = (
        [torch.empty_like(local_bytes) for _ in range(shard.group.size())] if rank == 0 else None
    )
    dist.gather(local_bytes, parts, group=shard.group, group_dst=0)
    return None if parts is None else [p.view(local.dtype) for p in parts]


def _assemble(shard: Shard, parts: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of one parameter, on CPU, from the shards of all ranks."""
    for name, shape in shard.hf_shapes().items():
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            for piece in shard.pieces(rank):
                if piece.name == name:
                    whole.narrow(shard.axis, piece.source, piece.length).copy_(
                        part.narrow(shard.axis, piece.target, piece.length)
                    )
        yield name, whole
