"""Megatron's forward step: a batch in, the objective's loss and the report out.

Route 2 (--loss-chunk-size) is chunked_head.py's.

Route 1 of the loss: the model returns Megatron's vocabulary-parallel cross entropy, whose target
logit and partition function are already reduced over the tensor-parallel ranks. So p = exp(−CE) on
every rank without another collective, and the weight is one elementwise multiply.

Shapes, per rank: b micro-batch, s = seq_length / context-parallel size.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_dft import logits_probe
from megatron_dft.arguments import settings
from megatron_dft.chunked_head import output_processor
from megatron_dft.context_parallel import token_indices
from megatron_dft.losses import registry
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_parallel import vocab_parallel_statistics
from megatron_dft.report import loss_report

# Along axis 1 of these a context-parallel rank holds its part of the row.
_PLAIN = registry.get("sft")
_PER_TOKEN = ("tokens", "labels", "loss_mask", "position_ids", "reference_log_prob")


def get_batch(data_iterator: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
    """The next micro-batch of this data-parallel replica, on this rank's device.

    Every rank of a replica reads the same rows itself (the data set is the same pure function of
    the sample number everywhere), so nothing is broadcast and every pipeline stage has the packing.

    Returns: tokens, labels, position_ids int64 [b, s], loss_mask fp32 [b, s], and with
    --dft-reference-scores reference_log_prob fp32 [b, s]; under context parallelism held int64 [s]
    (global positions); for packed rows cu_seqlens int32 [n+1] (global,
    each conversation with its padding) and max_seqlen (int), b is 1 then.
    """
    raw = next(data_iterator)
    per_token = [key for key in _PER_TOKEN if key in raw]
    batch: dict[str, Any] = {key: raw[key].cuda(non_blocking=True) for key in per_token}
    boundaries = None
    if "cu_seqlens" in raw:
        # One packed row a micro-batch (checks.py); rows are filled up with copies of the last edge.
        # CP needs conversations padded to a multiple; the padding belongs to the conversation.
        edges = raw.get("cu_seqlens_padded", raw["cu_seqlens"])[0]
        edges = edges[: int((edges < edges[-1]).sum()) + 1]
        boundaries = batch["cu_seqlens"] = edges.cuda(non_blocking=True)
        batch["max_seqlen"] = int(raw["max_seqlen"].max())
    size = mpu.get_context_parallel_world_size()
    if size > 1:
        rank = mpu.get_context_parallel_rank()
        length = batch["tokens"].shape[1]
        held = token_indices(length, size, rank, boundaries, batch["tokens"].device)
        for key in per_token:
            batch[key] = batch[key].index_select(1, held)
        batch["held"] = held
    return batch


def packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Megatron's description of a packed (thd) row, None for one sequence a row."""
    if "cu_seqlens" not in batch:
        return None
    boundaries = batch["cu_seqlens"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=batch["max_seqlen"],
        max_seqlen_kv=batch["max_seqlen"],
        tokens_per_sample=get_args().seq_length,
    )


def _token_stats(batch: dict[str, Any]) -> dict[str, Any]:
    """Fields of TokenStats that the micro-batch itself knows: which conversation a token is of."""
    stats: dict[str, Any] = {"context_parallel_group": mpu.get_context_parallel_group()}
    if "reference_log_prob" in batch:
        stats["reference_log_prob"] = batch["reference_log_prob"]
    if "cu_seqlens" in batch:
        boundaries, tokens = batch["cu_seqlens"], batch["tokens"]
        positions = batch.get("held")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        stats["segment_ids"] = torch.bucketize(positions, boundaries[1:], right=True)[None]
        stats["num_segments"] = len(boundaries)
    return stats


def _token_loss(
    batch: dict[str, Any], output_tensor: Tensor, training: bool, found: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, weight), fp32 [b, s] each; the loss is plain in evaluation."""
    if "token_weight" in batch:  # route 2: the output processor has done it
        return output_tensor, batch["cross_entropy"], batch["token_weight"]
    cross_entropy = output_tensor.float()
    # A weighted loss is not monotone in p: checkpoints may not be chosen by it.
    objective = settings().objective if training else _PLAIN
    stats = TokenStats(log_prob=-cross_entropy, mask=batch["loss_mask"], **batch["stats"], **found)
    loss, weight = objective(stats)
    if training and get_args().kl_coeff:
        loss = loss + get_args().kl_coeff * torch.where(batch["loss_mask"].bool(), found["kl"], 0.0)
    return loss, cross_entropy, weight


def loss_func(
    batch: dict[str, Any], output_tensor: Tensor, model: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the objective over this rank's supervised tokens, their number, and the report.

    Args:
        batch: of `get_batch`; `loss_mask` fp32 [b, s].
        output_tensor: per token, fp32 [b, s]: Megatron's cross entropy, or with --loss-chunk-size
            the objective's loss.
        model: the (wrapped) model chunk; in evaluation mode the loss is the plain cross entropy.

    Returns: the contract of Megatron's schedules (core/pipeline_parallel/schedules.py,
    forward_step_calc_loss): loss, int32 token count, name → [sum, count].
    """
    found = logits_probe.take(unwrap_model(model))
    correct = batch.get("correct", found.pop("correct", None))
    mask = batch["loss_mask"]
    token_loss, cross_entropy, weight = _token_loss(batch, output_tensor, model.training, found)
    loss = token_loss.sum()
    _stop_on_bad_loss(loss)
    report = loss_report(
        settings().objective.name if model.training else None,
        cross_entropy,
        token_loss,
        weight,
        mask,
        correct,
        found.get("kl"),
    )
    return loss, mask.sum().to(torch.int), report


def _stop_on_bad_loss(loss: Tensor) -> None:
    """Megatron's own check: a NaN or inf loss ends the job before it reaches the weights."""
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    machine = get_rerun_state_machine()
    for test, word in ((torch.isnan, "NaN"), (torch.isinf, "inf")):
        machine.validate_result(
            result=loss,
            rejection_func=test,
            message=f"found {word} in the local loss",
            tolerance=0.0,
            fatal=True,
        )


def _run_reference(batch: dict[str, Any], packed: PackedSeqParams | None, model: Any) -> None:
    """Let the frozen model see the micro-batch first; the last stage keeps what is compared."""
    reference = settings().reference
    assert reference is not None
    if get_args().kl_coeff or "kl" in settings().objective.needs:
        logits = reference(batch, packed)
        if logits is not None:
            model.dft_reference_logits = logits
            if "reference_log_prob" in settings().objective.needs:
                found = vocab_parallel_statistics(
                    logits, batch["labels"], mpu.get_tensor_model_parallel_group()
                )
                batch["stats"]["reference_log_prob"] = found.log_prob
        return
    cross_entropy = reference(batch, packed, labels=batch["labels"])
    if cross_entropy is not None:
        batch["stats"]["reference_log_prob"] = -cross_entropy.float()


def run_model(
    data_iterator: Iterator[dict[str, Tensor]], model: Any
) -> tuple[dict[str, Any], Tensor]:
    """One micro-batch through one model chunk: the batch of `get_batch` and the chunk's output.

    The last stage's output is fp32 [b, s]: as `loss_func` takes it, and in evaluation mode the
    plain cross entropy in both routes.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    batch["stats"], batch["training"] = _token_stats(batch), model.training
    packed = packed_seq_params(batch)
    route_2 = {}
    if get_args().loss_chunk_size is not None:
        route_2 = {"output_processor": output_processor, "output_processor_context": batch}
    if model.training and settings().reference is not None:
        _run_reference(batch, packed, unwrap_model(model))
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
        **route_2,
    )
    return batch, output_tensor


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through one model chunk; the callback of Megatron's schedules."""
    batch, output_tensor = run_model(data_iterator, model)
    return output_tensor, partial(loss_func, batch, model=model)
