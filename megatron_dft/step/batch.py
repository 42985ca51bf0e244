"""One micro-batch on this rank's device: what the data set gave, and what the loss will ask of it.

Shapes, per rank: b micro-batch, s = seq_length / context-parallel size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dft.compat.context_parallel import token_indices
from megatron_dft.flags.objective import KIND_END
from megatron_dft.flags.settings import settings

# Along axis 1 of these a context-parallel rank holds its part of the row.
_PER_TOKEN = (
    "tokens", "labels", "loss_mask", "position_ids", "reference_log_prob", "token_kinds",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Where the conversations of a packed row lie (b is 1 then).

    boundaries: cu_seqlens int32 [n+1], global, each conversation with its padding. max_seqlen: the
    longest, in tokens.
    """

    boundaries: Tensor
    max_seqlen: int

    def sequence_params(self, seq_length: int) -> PackedSeqParams:
        """Megatron's description of the row, in thd format; seq_length: tokens of a whole row."""
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.boundaries,
            cu_seqlens_kv=self.boundaries,
            cu_seqlens_q_padded=self.boundaries,
            cu_seqlens_kv_padded=self.boundaries,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_kv=self.max_seqlen,
            tokens_per_sample=seq_length,
        )


@dataclass
class HeadFigures:
    """What route 2 finds beside its loss: cross_entropy, weight fp32, correct bool, all [b, s]."""

    cross_entropy: Tensor
    weight: Tensor
    correct: Tensor


@dataclass
class MicroBatch:
    """A micro-batch of one data-parallel replica.

    From the data set, always: tokens, labels, position_ids int64 [b, s], loss_mask fp32 [b, s].

    reference_log_prob  fp32 [b, s]: with stored scores from the start, with a frozen model once it
                        has run; None where nothing is compared
    token_kinds         uint8 [b, s], bits of data/spec.py: what ends a turn, what the chat template
                        wrote; None where the data does not say
    packing             for packed rows
    held                under context parallelism: global positions int64 [s] of this rank's tokens
    training            whether the model is training: the loss is plain in evaluation
    head                with --loss-chunk-size, once the model has run
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    reference_log_prob: Tensor | None = None
    token_kinds: Tensor | None = None
    packing: Packing | None = None
    held: Tensor | None = None
    training: bool = field(default=False, kw_only=True)
    head: HeadFigures | None = field(default=None, kw_only=True)

    @property
    def ends(self) -> Tensor | None:
        """bool [b, s]: which labels end a turn."""
        return None if self.token_kinds is None else (self.token_kinds & KIND_END) != 0

    def token_stats(self) -> dict[str, Any]:
        """Fields of TokenStats that the batch itself knows: which conversation a token is of."""
        stats: dict[str, Any] = {"context_parallel_group": mpu.get_context_parallel_group()}
        if self.reference_log_prob is not None:
            stats["reference_log_prob"] = self.reference_log_prob
        if settings().full_weight:
            assert self.token_kinds is not None, "the data set does not say what ends a turn"
            stats["full_weight"] = (self.token_kinds & settings().full_weight) != 0
        if self.packing is not None:
            positions = self.held
            if positions is None:
                positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
            edges = self.packing.boundaries
            stats["segment_ids"] = torch.bucketize(positions, edges[1:], right=True)[None]
            stats["num_segments"] = len(edges)
        return stats


def get_batch(data_iterator: Iterator[dict[str, Tensor]], training: bool) -> MicroBatch:
    """The next micro-batch of this data-parallel replica, on this rank's device.

    Every rank of a replica reads the same rows itself (the data set is the same pure function of
    the sample number everywhere), so nothing is broadcast and every pipeline stage has the packing.
    """
    raw = next(data_iterator)
    per_token = {k: raw[k].cuda(non_blocking=True) for k in _PER_TOKEN if k in raw}
    packing = _packing(raw) if "cu_seqlens" in raw else None
    size, held = mpu.get_context_parallel_world_size(), None
    if size > 1:
        held = token_indices(
            per_token["tokens"].shape[1],
            size,
            mpu.get_context_parallel_rank(),
            None if packing is None else packing.boundaries,
            per_token["tokens"].device,
        )
        per_token = {key: value.index_select(1, held) for key, value in per_token.items()}
    return MicroBatch(**per_token, packing=packing, held=held, training=training)


def _packing(raw: dict[str, Tensor]) -> Packing:
    # One packed row a micro-batch (flags/batch.py); it is filled up with copies of the last edge.
    # CP needs conversations padded to a multiple; the padding belongs to the conversation.
    edges = raw.get("cu_seqlens_padded", raw["cu_seqlens"])[0]
    edges = edges[: int((edges < edges[-1]).sum()) + 1]
    return Packing(edges.cuda(non_blocking=True), int(raw["max_seqlen"].max()))
