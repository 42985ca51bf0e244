"""A scoring run: the model forward over every conversation of the training data, its log p stored.

Megatron's own schedules run it, in any layout. Shapes: b micro-batch, S sequence length,
s = S / context-parallel size.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from torch import Tensor

from megatron_dft.compat import checkpointing
from megatron_dft.data.dataset import ChatDataset
from megatron_dft.data.reference_scores import ScoreWriter
from megatron_dft.data.score_rows import SegmentRows
from megatron_dft.step.batch import MicroBatch
from megatron_dft.step.forward_step import run_model
from megatron_dft.storage import terminal
from megatron_dft.training import data_provider
from megatron_dft.training.identity import model_identity
from megatron_dft.training.model import ModelHandle, model_config


def _writer(args: Any, data: ChatDataset) -> ScoreWriter:
    return ScoreWriter(
        args.dft_reference_scores,
        data.conversations,
        data.identity,
        model_identity(args),
        args.score_segment_tokens,
    )


def prepare(args: Any) -> None:
    """Tokenise, and refuse a directory of other scores, before any model is built."""
    _writer(args, data_provider.build(args, "--train-data", None, shuffle=True, progress=True))


def score(args: Any) -> None:
    """Score what is not scored yet, on all ranks."""
    initialize_megatron()
    data = data_provider.build(args, "--train-data", None, shuffle=True)
    writes = (
        mpu.is_pipeline_last_stage()
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    writer = _writer(args, data) if writes else None
    borders, done = _plan(writer)
    todo = [i for i in range(len(borders)) if i not in done]
    if dist.get_rank() == 0:
        terminal.say(f"> scoring: {len(todo)} of {len(borders)} segments are to be done")
    if todo:
        _score_segments(args, data, writer, borders, todo)
    if writer is not None and not writer.complete:
        header = writer.finish().header
        terminal.say(f"> scores of {header['model']['name']}: {args.dft_reference_scores}")
    dist.barrier()


def _plan(writer: ScoreWriter | None) -> tuple[list[tuple[int, int]], set[int]]:
    """Borders and stored segments, as the writing rank sees them; collective."""
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, None if writer is None else (writer.borders, writer.done))
    ((borders, done),) = [s for s in seen if s is not None]
    return borders, set(done)


def _score_segments(
    args: Any,
    data: ChatDataset,
    writer: ScoreWriter | None,
    borders: list[tuple[int, int]],
    todo: list[int],
) -> None:
    model = _build_model(args)
    if writer is not None:
        writer.start()
    started, tokens = time.monotonic(), 0
    for number, segment in enumerate(todo, start=1):
        rows = SegmentRows(
            data,
            range(*borders[segment]),
            args.micro_batch_size,
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
        )
        found = _run(args, model, rows)
        if writer is None:
            continue
        assert found is not None
        scores = rows.split(found)
        writer.write(segment, scores)
        tokens += sum(map(len, scores.values()))
        terminal.say(
            f"> scored {number} of {len(todo)} segments, "
            f"{tokens / (time.monotonic() - started):,.0f} tokens/s"
        )


def _build_model(args: Any) -> list[Any]:
    """This rank's part of the model in evaluation mode, without optimizer; collective."""
    checkpointing.fail_on_silent_exits()
    config = model_config(args, ModelHandle(args))
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in chunks:
        chunk.eval()
    return chunks


def _forward(iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """The callback of Megatron's schedules."""
    batch, output_tensor = run_model(iterator, model)
    return output_tensor, partial(_log_prob, batch)


def _log_prob(batch: MicroBatch, output_tensor: Tensor, non_loss_data: bool) -> Tensor:
    """log p of the targets, fp32 [b, S] on every context-parallel rank; 0 where not supervised."""
    assert non_loss_data
    found = torch.where(batch.loss_mask.bool(), -output_tensor.float(), 0.0)
    if batch.held is None:
        return found
    whole = found.new_zeros(len(found), get_args().seq_length)
    whole[:, batch.held] = found
    dist.all_reduce(whole, group=mpu.get_context_parallel_group())
    return whole


@torch.no_grad()
def _run(args: Any, model: list[Any], rows: SegmentRows) -> Tensor | None:
    """log p of a segment's rows, fp32 on the CPU [rows, S], on the last stage; collective."""
    found = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=rows.micro_batches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not mpu.is_pipeline_last_stage():
        return None
    mine = torch.stack(found)
    size = mpu.get_data_parallel_world_size()
    every = mine.new_empty(size * mine.numel())
    dist.all_gather_into_tensor(every, mine.flatten(), group=mpu.get_data_parallel_group())
    # Replica, micro-batch, row in it → the order in which the rows were dealt.
    return every.view(size, *mine.shape).transpose(0, 1).reshape(-1, args.seq_length).cpu()
