"""Hugging Face checkpoint -> torch_dist, one box of rows at a time.

No GPU, no launcher and no model in memory: the skeleton says what goes where, the bytes are copied
from file to file, at most 8 MiB at once.
"""

import functools
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dft.hf import directory, skeleton
from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.consumption import (
    check_all_consumed,
    check_finite,
    check_shapes,
    check_tied_copy,
    count,
)
from megatron_dft.hf.parameters import row_pieces, shards
from megatron_dft.hf.pieces import PADDING
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.hf.stock_flags import megatron_parser
from megatron_dft.hf.torch_dist import BOX_BYTES, TorchDistWriter
from megatron_dft.storage.overlap import ahead
from megatron_dft.storage.safetensors import Reader
from megatron_dft.storage.torch_dist import RELEASE, TRACKER, iteration_directory

# Called with the bytes done and the bytes in all.
Progress = Callable[[int, int], None]


def import_checkpoint(
    checkpoint: HFCheckpoint,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write `checkpoint` as a torch_dist "release" checkpoint that Megatron's --load takes.

    Tensors keep their dtypes (Megatron converts as it loads). The directory appears complete, by a
    rename. Raises ValueError as `load_hf_weights` does, and when `out_dir` is not empty.
    """
    out = directory.target(out_dir)
    staging = directory.start(checkpoint, out, overwrite)
    release = iteration_directory(staging, RELEASE)
    release.mkdir()
    with skeleton.single_process(), Reader() as reader:
        model = skeleton.build(checkpoint)
        for shard in shards([model], checkpoint):
            check_shapes(shard, checkpoint)
        check_tied_copy(checkpoint, reader)
        boxes, objects = skeleton.walk(model, checkpoint, skeleton.CONTENT)
        consumed: Counter[str] = Counter()
        for shard in {b.shard.name: b.shard for b in boxes}.values():
            count(shard, checkpoint, consumed)
        check_all_consumed(checkpoint, consumed)
        writer = TorchDistWriter(release)
        done, total = 0, sum(t.nbytes for t in checkpoint.tensors.values())
        for part in ahead(_parts(boxes, checkpoint, reader)):
            writer.write_tensor(part.key, part.global_shape, part.offset, part.tensor)
            done += part.tensor.nbytes
            progress(done, total)
        for entry in objects:
            writer.write_object(entry.unique_key, entry.data)
        writer.write_object("common_state/shard_0_1", _common_state(checkpoint))
        writer.close()
    (staging / TRACKER).write_text(RELEASE)
    directory.publish(staging, out)
    return out


@dataclass(frozen=True)
class _Part:
    """Some rows of a box, as torch_dist wants them."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


def _parts(boxes: list[skeleton.Box], checkpoint: HFCheckpoint, reader: Reader) -> Iterator[_Part]:
    for box in boxes:
        shard, tensor = box.shard, box.tensor
        kinds = [checkpoint.tensors[r.name].dtype for r in shard.runs if r.name != PADDING]
        dtype = functools.reduce(torch.promote_types, kinds)
        row_shape = tuple(tensor.local_shape[1:])
        step = max(1, BOX_BYTES // (torch.Size(row_shape).numel() * dtype.itemsize))
        axes = tensor.prepend_axis_num
        for row in range(0, box.rows, step):
            rows = torch.empty((min(step, box.rows - row), *row_shape), dtype=dtype)
            begin = box.first_row + row
            for piece in row_pieces(shard, begin, begin + rows.shape[0]):
                target = rows.narrow(0, piece.target, piece.length)
                reader.read_into(checkpoint.tensors[piece.name], piece.source, target)
                check_finite(piece.name, target, checkpoint)
            offset = list(tensor.global_offset)
            offset[axes] += row
            lifted = rows.view((1,) * axes + rows.shape)
            yield _Part(tensor.key, tensor.global_shape, tuple(offset), lifted)


def _common_state(checkpoint: HFCheckpoint) -> dict[str, Any]:
    """What Megatron keeps beside the tensors; `args` is what --use-checkpoint-args reads."""
    args = Namespace(**vars(megatron_parser().parse_args([])) | megatron_args(checkpoint))
    args.hf_model, args.hf_revision = checkpoint.name, checkpoint.revision
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": skeleton.CONTENT,
    }
