"""Conversations to the arrays of one training row, with or without packing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_dft.data.spec import ID_MASK, KIND_SHIFT, SUPERVISED

# The label of positions that do not train: Megatron's and torch's cross entropies ignore it.
IGNORE_INDEX = -100


def build_row(
    conversations: Sequence[np.ndarray],
    *,
    seq_length: int,
    pad_id: int,
    pad_multiple: int = 1,
    max_segments: int | None = None,
    reference_log_prob: Sequence[np.ndarray] | None = None,
    token_weights: Sequence[np.ndarray] | None = None,
    sources: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """One sample of a Megatron batch.

    A conversation of n flagged tokens takes n - 1 positions: its last token is a label only. So no
    label ever lies across two conversations.

    Args:
        conversations: uint32 [n] each, flagged as spec says; none at all gives a row of padding.
        pad_multiple: each conversation begins at a multiple of it (2·CP with context parallelism).
        max_segments: None for a row without packing metadata. Otherwise the fixed count of
            segments, so that rows stack: cu_seqlens has max_segments + 1 entries.
        reference_log_prob: float32 [n - 1] for each conversation: what a reference model gives its
            tokens 1 … n - 1.
        token_weights: float32 [n] for each conversation: the factor on each token's loss.
        sources: which item of --train-data each conversation is of.

    Returns int64 [S] tokens, labels (already shifted; IGNORE_INDEX where nothing trains) and
    position_ids (from 0 in each conversation), float32 [S] loss_mask, bool [S] padding_mask (True
    where no conversation's token is), and with packing int32 cu_seqlens (ends with copies of S, as
    Megatron strips them), int32 scalar max_seqlen, and cu_seqlens_padded (the same values) where
    pad_multiple > 1. Conversations are padded inside their own segment; the rest of the row is one
    more segment. With reference scores also float32
    [S] reference_log_prob, in line with the labels, 0 in the padding.

    Also in line with the labels: uint8 [S] token_kinds (spec.KIND_END: it ends a trained turn,
    KIND_WRITTEN: the chat template wrote it; 0 where nothing trains); with token_weights float32
    [S] token_weights, other than 0 exactly where loss_mask is 1, below 0 for negative rewards
    alone; with sources int16 [S] source_ids, -1 in the padding.
    """
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros(seq_length, dtype=np.int64)
    padding = np.ones(seq_length, dtype=bool)
    kinds = np.zeros(seq_length, dtype=np.uint8)
    spans = row_spans([len(c) - 1 for c in conversations], pad_multiple)
    borders = [0, *(end for _, end in spans)]
    for flagged, (at, end) in zip(conversations, spans, strict=True):
        count = len(flagged) - 1
        ids = (flagged & ID_MASK).astype(np.int64)
        tokens[at : at + count] = ids[:-1]
        padding[at : at + count] = False
        trained = (flagged[1:] & SUPERVISED) != 0
        labels[at : at + count][trained] = ids[1:][trained]
        kinds[at : at + count] = (flagged[1:] >> KIND_SHIFT) & 3
        positions[at:end] = np.arange(end - at)
    used = borders[-1]
    if used < seq_length:
        positions[used:] = np.arange(seq_length - used)
        borders.append(seq_length)
    row = {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy((labels != IGNORE_INDEX).astype(np.float32)),
        "position_ids": torch.from_numpy(positions),
        "padding_mask": torch.from_numpy(padding),
        "token_kinds": torch.from_numpy(kinds),
    }
    if max_segments is not None:
        padded = borders + [seq_length] * (max_segments + 1 - len(borders))
        row["cu_seqlens"] = torch.tensor(padded, dtype=torch.int32)
        row["max_seqlen"] = torch.tensor(int(np.diff(borders).max()), dtype=torch.int32)
        if pad_multiple > 1:
            row["cu_seqlens_padded"] = row["cu_seqlens"].clone()
    if reference_log_prob is not None:
        row["reference_log_prob"] = _laid_out(reference_log_prob, spans, seq_length)
    if token_weights is not None:
        row["token_weights"] = _laid_out([w[1:] for w in token_weights], spans, seq_length)
    if sources is not None:
        ids = np.full(seq_length, -1, dtype=np.int16)
        for source, flagged, (at, _) in zip(sources, conversations, spans, strict=True):
            ids[at : at + len(flagged) - 1] = source
        row["source_ids"] = torch.from_numpy(ids)
    return row


def _laid_out(
    values: Sequence[np.ndarray], spans: Sequence[tuple[int, int]], seq_length: int
) -> torch.Tensor:
    """float32 [S]: each conversation's values at its place, 0 in the padding."""
    row = np.zeros(seq_length, dtype=np.float32)
    for found, (at, _) in zip(values, spans, strict=True):
        row[at : at + len(found)] = found
    return torch.from_numpy(row)


def row_spans(counts: Sequence[int], pad_multiple: int) -> list[tuple[int, int]]:
    """[begin, end) positions of each conversation in a row, its padding included.

    counts: positions that each takes.
    """
    spans, at = [], 0
    for count in counts:
        end = at + -(-count // pad_multiple) * pad_multiple
        spans.append((at, end))
        at = end
    return spans
