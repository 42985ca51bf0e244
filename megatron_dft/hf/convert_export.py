"""torch_dist, saved at any layout -> Hugging Face directory, 8 MiB at a time.

No GPU, no launcher and no model in memory: some rows of a stored box (a shard of the run that saved
it) are read, cut along the tensors they belong to, and written to their places.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_dft.hf import directory, skeleton
from megatron_dft.hf.companions import TrainedChat
from megatron_dft.hf.consumption import check_shapes
from megatron_dft.hf.convert_import import Progress
from megatron_dft.hf.export import MAX_FILE_BYTES, file_names, plan_files
from megatron_dft.hf.parameters import row_pieces, shards
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.hf.torch_dist import Chunk, TorchDistReader
from megatron_dft.storage.overlap import ahead
from megatron_dft.storage.safetensors_writer import Writer
from megatron_dft.storage.torch_dist import (
    CONFIG,
    TRACKER,
    backend,
    iteration_directory,
    read_tracker,
)


def find_iteration(checkpoint_dir: str | Path) -> Path:
    """The directory of tensors in a Megatron checkpoint: itself, or the one its tracker names.

    Raises ValueError when there is none, or it is not in the torch_dist format.
    """
    root = Path(checkpoint_dir)
    found = root
    if not (root / CONFIG).is_file():
        iteration = read_tracker(root)
        if iteration is None:
            raise ValueError(
                f"{root}: no Megatron checkpoint (no {TRACKER}, no {CONFIG}); give what was passed "
                "to --save"
            )
        found = iteration_directory(root, iteration)
    if backend(found) != "torch_dist":
        raise ValueError(
            f"{found}: not in the torch_dist format; save with --ckpt-format torch_dist"
        )
    return found


def training_args(iteration_dir: Path) -> Any:
    """The argparse Namespace of the run that saved the checkpoint, or None if it kept none."""
    with skeleton.single_process():
        return dist_checkpointing.load_common_state_dict(str(iteration_dir)).get("args")


def export_checkpoint(
    checkpoint_dir: str | Path,
    checkpoint: HFCheckpoint,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: str | None = None,
    chat: TrainedChat | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write a torch_dist checkpoint, saved at any layout, as a Hugging Face directory.

    checkpoint is the base model (names, config.json, tokenizer). Raises ValueError when the two do
    not fit each other; see `save_hf` for the other arguments and the guarantees.
    """
    source = find_iteration(checkpoint_dir)
    out = directory.target(out_dir)
    staging = directory.start(checkpoint, out, overwrite)
    reader = TorchDistReader(source)
    with skeleton.single_process():
        common = dist_checkpointing.load_common_state_dict(str(source))
        content = common.get("content_metadata") or skeleton.CONTENT
        model = skeleton.build(checkpoint)
        boxes, _ = skeleton.walk(model, checkpoint, content)
        owned = [s for s in shards([model], checkpoint) if not s.rule.is_copy]
        for shard in owned:
            check_shapes(shard, checkpoint)
        plan = plan_files(owned, checkpoint, dtype, max_file_bytes)
        files = file_names(len(plan))
        place: dict[str, Writer] = {}
        writers = []
        for name, contents in zip(files, plan, strict=True):
            writers.append(Writer(staging / name, contents))
            place.update(dict.fromkeys(contents, writers[-1]))
        by_key: dict[str, list[skeleton.Box]] = {}
        for box in boxes:
            by_key.setdefault(box.tensor.key, []).append(box)
        done, total = 0, sum(t.nbytes for t in checkpoint.tensors.values())
        for parts, chunk in ahead(_stored(reader, by_key, source)):
            for box in parts:
                _export_overlap(chunk, box, place)
            done += chunk.tensor.nbytes
            progress(min(done, total), total)
        for writer in writers:
            writer.close()
    directory.finish(checkpoint, staging, out, files, dtype=dtype, card=card, chat=chat)
    return out


def _stored(
    reader: TorchDistReader, by_key: dict[str, list[skeleton.Box]], source: Path
) -> Iterator[tuple[list[skeleton.Box], Chunk]]:
    """Everything stored under the keys, each part with the boxes that it may lie in."""
    for key, parts in by_key.items():
        _check_key(reader, key, parts[0], source)
        for chunk in reader.chunks(key):
            yield parts, chunk


def _check_key(reader: TorchDistReader, key: str, box: skeleton.Box, source: Path) -> None:
    stored, expected = reader.shape(key), tuple(box.tensor.global_shape)
    if stored is None:
        raise ValueError(
            f"{source}: has no tensor {key!r}; is --hf-model the model it was made of?"
        )
    is_vocabulary = any(n in key for n in ("word_embeddings", "output_layer"))
    fits = stored[1:] == expected[1:] and stored[0] >= expected[0] if is_vocabulary else None
    if not (stored == expected or fits):
        raise ValueError(
            f"{source}: tensor {key!r} has shape {list(stored)}, --hf-model implies "
            f"{list(expected)}; is it the model that the checkpoint was made of?"
        )


def _export_overlap(chunk: Chunk, box: skeleton.Box, place: dict[str, Writer]) -> None:
    """Write what of a stored box lies in `box` to the Hugging Face tensors it belongs to."""
    tensor = box.tensor
    axes = tensor.prepend_axis_num
    local = (1,) * axes + tuple(tensor.local_shape)
    cut, begin = chunk.tensor, []
    for axis, (a, n, b, m) in enumerate(
        zip(chunk.offset, cut.shape, tensor.global_offset, local, strict=True)
    ):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return
        cut = cut.narrow(axis, low - a, high - low)
        begin.append(low - b)
    cut = cut.reshape(cut.shape[axes:])
    row = begin[axes]
    column = begin[axes + 1] if len(begin) > axes + 1 else 0
    first = box.first_row + row
    for piece in row_pieces(box.shard, first, first + cut.shape[0]):
        writer = place[piece.name]
        part = cut.narrow(0, piece.target, piece.length).to(writer.dtype(piece.name))
        writer.write_region(piece.name, piece.source, column, part)
