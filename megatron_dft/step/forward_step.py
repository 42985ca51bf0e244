"""Megatron's forward step: a batch in, the objective's loss and the report out.

Two routes (flags/route.py). The head is chunked_head.py's. On the logits the model returns a
vocabulary-parallel cross entropy, Megatron's or ours (logits_probe.py), whose target logit and
partition function are already reduced over the tensor-parallel ranks. So p = exp(−CE) on every rank
without another collective, and the weight is one elementwise multiply (loss.py).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_dft.flags.settings import settings
from megatron_dft.losses.vocab_parallel import vocab_parallel_statistics
from megatron_dft.step.batch import MicroBatch, get_batch
from megatron_dft.step.chunked_head import (
    hidden_processor,
    output_processor,
    reference_log_prob,
)
from megatron_dft.step.loss import loss_func


def _run_reference(batch: MicroBatch, packed: PackedSeqParams | None, chunk: Any) -> None:
    """Let the frozen model see the micro-batch first; the last stage keeps what is compared."""
    needs, head = settings().objective.needs, settings().route.head
    wants_kl = get_args().kl_coeff or "kl" in needs
    if wants_kl and head:
        batch.reference_head = chunk.dft_reference(
            batch, packed, labels=batch.labels, output_processor=hidden_processor
        )
        if batch.reference_head is not None and "reference_log_prob" in needs:
            batch.reference_log_prob = reference_log_prob(batch, chunk.output_layer)
    elif wants_kl:
        logits = chunk.dft_reference(batch, packed)
        if logits is not None:
            chunk.dft_probe.reference_logits = logits
            if "reference_log_prob" in needs:
                group = mpu.get_tensor_model_parallel_group()
                found = vocab_parallel_statistics(logits, batch.labels, group)
                batch.reference_log_prob = found.log_prob
    else:
        cross_entropy = chunk.dft_reference(batch, packed, labels=batch.labels)
        if cross_entropy is not None:
            batch.reference_log_prob = -cross_entropy.float()


def run_model(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[MicroBatch, Tensor]:
    """One micro-batch through one model chunk: the batch and the chunk's output.

    The last stage's output is fp32 [b, s]: as `loss_func` takes it, and in evaluation mode the
    plain cross entropy in both routes. Where the chunk has a frozen model (`dft_reference`), that
    runs first.
    """
    timers, args = get_timers(), get_args()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model.training)
    timers("batch-generator").stop()
    packed = None if batch.packing is None else batch.packing.sequence_params(args.seq_length)
    head = {}
    if settings().route.head:
        head = {"output_processor": output_processor, "output_processor_context": batch}
    chunk = unwrap_model(model)
    if chunk.post_process:
        chunk.dft_probe.mask = batch.loss_mask
    if batch.training and getattr(chunk, "dft_reference", None) is not None:
        _run_reference(batch, packed, chunk)
    output_tensor = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=packed,
        padding_mask=_padding_mask(batch, chunk),
        **head,
    )
    return batch, output_tensor


def _padding_mask(batch: MicroBatch, chunk: Any) -> Tensor | None:
    """What the chunk's routers leave out of their losses; None for a model without experts."""
    mask, config = batch.padding_mask, chunk.config
    if mask is None or chunk.pre_process or not config.sequence_parallel:
        return mask
    # Megatron cuts it for sequence parallelism where it embeds, on the first stage alone.
    return mask.chunk(config.tensor_model_parallel_size, dim=1)[
        mpu.get_tensor_model_parallel_rank()
    ]


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one model chunk; the callback of Megatron's schedules."""
    batch, output_tensor = run_model(data_iterator, model)
    return output_tensor, partial(loss_func, batch, model=model)
