"""A packed batch to what Megatron's attention takes; pure functions, no Megatron here."""

from __future__ import annotations

from typing import Any

import torch


def packed_seq_fields(
    cu_seqlens: torch.Tensor,
    max_seqlen: torch.Tensor,
    cu_seqlens_padded: torch.Tensor | None = None,
    tokens_per_sample: int | None = None,
) -> dict[str, Any]:
    """Keywords of `megatron.core.packed_seq_params.PackedSeqParams` for one micro-batch.

    Args:
        cu_seqlens: int32 [1, n] or [n], as `flatten_batch_for_packed_sequences` leaves it (merged
            over the micro-batch, filler entries stripped): global positions, before CP.
        max_seqlen: int32 scalar or [1].
        cu_seqlens_padded: the same, or None without context parallelism.
        tokens_per_sample: --seq-length.

    Rows pad each conversation inside its own segment, so both borders are the same numbers; under a
    causal mask the padding behind a conversation is seen by nobody.
    """
    borders = cu_seqlens.reshape(-1)
    padded = None if cu_seqlens_padded is None else cu_seqlens_padded.reshape(-1)
    longest = int(max_seqlen.max().item())
    return dict(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=tokens_per_sample,
    )


def context_parallel_indices(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """int64 [T / cp_size]: the positions of a packed row that a context-parallel rank holds.

    Each segment is cut into 2·cp_size equal chunks and rank r takes chunks r and 2·cp_size - 1 - r,
    which balances causal attention: what transformer-engine's `thd_get_partitioned_indices` gives,
    here without a GPU.

    Args:
        cu_seqlens: int32 [n] or [1, n], global positions; segment lengths must be multiples of
            2·cp_size (the data set's pad_multiple sees to it).
    """
    borders = cu_seqlens.reshape(-1).tolist()
    pieces = []
    for begin, end in zip(borders, borders[1:], strict=False):
        chunk, rest = divmod(end - begin, 2 * cp_size)
        if rest:
            raise ValueError(
                f"a packed segment of {end - begin} positions does not divide into {2 * cp_size} "
                "chunks; build the data set with pad_multiple = 2 × --context-parallel-size"
            )
        for part in (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(torch.arange(begin + part * chunk, begin + (part + 1) * chunk))
    return torch.cat(pieces)
