"""One micro-batch on this rank's device: what the data set gave, and what the loss will ask of it.

Shapes, per rank: b micro-batch, s = seq_length / context-parallel size.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import get_args
from torch import Tensor

from megatron_dft.compat.context_parallel import token_indices
from megatron_dft.flags.objective import KIND_END
from megatron_dft.flags.settings import settings
from megatron_dft.step.lookahead import next_rows, weight_factor

# Along axis 1 of these a context-parallel rank holds its part of the row.
_PER_TOKEN = (
    "tokens", "labels", "loss_mask", "position_ids", "reference_log_prob", "token_kinds",
    "token_weights", "source_ids",
)  # fmt: skip
_OF_EXPERTS = ("padding_mask",)


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
    """What the head finds beside its loss: cross_entropy, weight, kl fp32, correct bool [b, s]."""

    cross_entropy: Tensor
    weight: Tensor
    correct: Tensor
    kl: Tensor | None = None


@dataclass
class ReferenceHead:
    """A frozen model's hidden states [s, b, h] (s/tp under SP) and its output weight [V/tp, h]."""

    hidden: Tensor
    weight: Tensor


@dataclass
class MicroBatch:
    """A micro-batch of one data-parallel replica.

    From the data set, always: tokens, labels, position_ids int64 [b, s], loss_mask fp32 [b, s].

    padding_mask        bool [b, s] for a model with experts: True where no conversation's token is
    reference_log_prob  fp32 [b, s]: with stored scores from the start, with a frozen model once it
                        has run; None where nothing is compared
    token_kinds         uint8 [b, s], bits of data/spec.py: what ends a turn, what the chat template
                        wrote; None where the data does not say
    token_weights       fp32 [b, s], above 0 where loss_mask is 1: the data's factors on the tokens'
                        losses, times lookahead.weight_factor(); None where the data has none, or
                        where they are rewards
    reward              fp32 [b, s], of either sign, for an objective that asks for it
    source_ids          int16 [b, s], which item of --train-data, −1 in padding; None for one item
    full_weight         bool [b, s], tokens of weight 1 (--dft-full-weight); None where none are
    packing             for packed rows
    held                under context parallelism: global positions int64 [s] of this rank's tokens
    training            whether the model is training: the loss is plain in evaluation
    reference_head      for a KL of the head: what a frozen model has in the place of logits
    host_mask           loss_mask in host memory, where the device has another
    whole_gradient      no --loss-row-filter: the self-test compares every row
    head                where the loss is taken from the hidden states, once the model has run
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    padding_mask: Tensor | None = None
    reference_log_prob: Tensor | None = None
    token_kinds: Tensor | None = None
    token_weights: Tensor | None = None
    reward: Tensor | None = None
    source_ids: Tensor | None = None
    full_weight: Tensor | None = None
    packing: Packing | None = None
    held: Tensor | None = None
    training: bool = field(default=False, kw_only=True)
    host_mask: Tensor | None = field(default=None, kw_only=True)
    reference_head: ReferenceHead | None = field(default=None, kw_only=True)
    whole_gradient: bool = field(default=False, kw_only=True)
    head: HeadFigures | None = field(default=None, kw_only=True)

    @property
    def supervised(self) -> Tensor:
        """loss_mask, in host memory where it is known there: reading it then waits for nothing."""
        return self.loss_mask if self.host_mask is None else self.host_mask

    @property
    def ends(self) -> Tensor | None:
        """bool [b, s]: which labels end a turn."""
        return None if self.token_kinds is None else (self.token_kinds & KIND_END) != 0

    def token_stats(self) -> dict[str, Any]:
        """Fields of TokenStats that the batch itself knows: which conversation a token is of."""
        stats: dict[str, Any] = {"context_parallel_group": mpu.get_context_parallel_group()}
        if self.reference_log_prob is not None:
            stats["reference_log_prob"] = self.reference_log_prob
        if self.reward is not None:
            stats["reward"] = self.reward
        if self.full_weight is not None:
            stats["full_weight"] = self.full_weight
        if self.packing is not None:
            positions = self.held
            if positions is None:
                positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
            edges = self.packing.boundaries
            stats["segment_ids"] = torch.bucketize(positions, edges[1:], right=True)[None]
            stats["num_segments"] = len(edges)
        return stats


_first_rows: list[int] = []


def first_rows() -> int | None:
    """A checksum of the rows of the first training micro-batch that this rank has read."""
    return _first_rows[0] if _first_rows else None


def _note_first_rows(raw: dict[str, Tensor]) -> None:
    if not _first_rows:
        names = sorted(name for name, value in raw.items() if isinstance(value, Tensor))
        parts = (raw[name].contiguous().numpy().tobytes() for name in names)
        _first_rows.append(zlib.crc32(b"".join(parts)))


def get_batch(data_iterator: Iterator[dict[str, Tensor]], training: bool) -> MicroBatch:
    """The next micro-batch of this data-parallel replica, on this rank's device.

    Every rank of a replica reads the same rows itself (the data set is the same pure function of
    the sample number everywhere), so nothing is broadcast and every pipeline stage has the packing.
    """
    raw = next_rows(data_iterator, training)
    if training:
        _note_first_rows(raw)
    names = _PER_TOKEN + (_OF_EXPERTS if get_args().num_experts else ())
    per_token = {name: raw[name] for name in names if name in raw}
    if "reward" in settings().objective.needs:  # all of them 1 where the data has no weights
        per_token["reward"] = per_token.pop("token_weights", per_token["loss_mask"])
    if settings().full_weight:
        per_token["full_weight"] = (per_token["token_kinds"] & settings().full_weight) != 0
    # All of this is on the host, and so are the indices: reading one of the device would wait for
    # everything that was launched before.
    edges = _edges(raw) if "cu_seqlens" in raw else None
    size, held = mpu.get_context_parallel_world_size(), None
    if size > 1:
        length, rank = per_token["tokens"].shape[1], mpu.get_context_parallel_rank()
        held = token_indices(length, size, rank, edges, torch.device("cpu"))
        per_token = {name: value.index_select(1, held) for name, value in per_token.items()}
        held = _to_device(held)
    packing = None
    if edges is not None:
        packing = Packing(_to_device(edges), int(raw["max_seqlen"].max()))
    on_device = {name: _to_device(value) for name, value in per_token.items()}
    if training and "token_weights" in on_device and (factor := weight_factor()) is not None:
        on_device["token_weights"] = on_device["token_weights"] * factor
    return MicroBatch(
        **on_device,
        packing=packing,
        held=held,
        training=training,
        host_mask=per_token["loss_mask"],
    )


def _edges(raw: dict[str, Tensor]) -> Tensor:
    """cu_seqlens of the one packed row of a micro-batch (flags/batch.py), on the host."""
    # It is filled up with copies of the last edge.
    # CP needs conversations padded to a multiple; the padding belongs to the conversation.
    edges = raw.get("cu_seqlens_padded", raw["cu_seqlens"])[0]
    return edges[: int((edges < edges[-1]).sum()) + 1]


def _to_device(value: Tensor) -> Tensor:
    """A copy that does not wait: from memory that is not pinned it would."""
    pinned = value if value.is_pinned() else value.pin_memory()
    return pinned.cuda(non_blocking=True)
