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
from megatron_dft.losses.prior_mass import log_mass
from megatron_dft.losses.vocab_parallel import vocab_parallel_statistics
from megatron_dft.step.batch import MicroBatch, get_batch
from megatron_dft.step.chunked_head import (
    hidden_processor,
    output_processor,
    reference_log_mass,
    reference_log_prob,
)
from megatron_dft.step.loss import loss_func


def _run_reference(batch: MicroBatch, packed: PackedSeqParams | None, chunk: Any) -> None:
    """Let the frozen model see the micro-batch first; the last stage keeps what is compared."""
    objective, head = settings().objective, settings().route.head
    wants_kl = get_args().kl_coeff or "kl" in objective.needs
    if (wants_kl or objective.wants_mass) and head:
        reference = chunk.dft_reference(
            batch, packed, labels=batch.labels, output_processor=hidden_processor
        )
        if reference is not None:
            if "reference_log_prob" in objective.needs:
                find = reference_log_mass if objective.wants_mass else reference_log_prob
                batch.reference_log_prob = find(batch, reference, chunk.output_layer)
            batch.reference_head = reference if wants_kl else None
    elif wants_kl or objective.wants_mass:
        logits = chunk.dft_reference(batch, packed)
        if logits is not None:
            if "reference_log_prob" in objective.needs:
                batch.reference_log_prob = _of_logits(logits, batch.labels, objective.wants_mass)
            chunk.dft_probe.reference_logits = logits if wants_kl else None
    else:
        cross_entropy = chunk.dft_reference(batch, packed, labels=batch.labels)
        if cross_entropy is not None:
            batch.reference_log_prob = -cross_entropy.float()


def _of_logits(logits: Tensor, labels: Tensor, mass: bool) -> Tensor:
    """The reference's log p of the labels, or log u, fp32 [b, s]; logits [b, s, V/tp]."""
    group = mpu.get_tensor_model_parallel_group()
    if not mass:
        return vocab_parallel_statistics(logits, labels, group).log_prob
    found = log_mass(logits.flatten(0, 1), labels.flatten(), group)
    return found.view_as(labels)


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
    compares = batch.training or settings().objective.entry.per_pair
    if compares and getattr(chunk, "dft_reference", None) is not None:
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
