"""Statistics of one shard's logits: K1, and the search for the k likeliest where asked for."""

from typing import Any

import torch
from torch import Tensor

from megatron_dft.losses.kernels.likeliest import likeliest
from megatron_dft.losses.kernels.merge import merge
from megatron_dft.losses.kernels.statistics import part_statistics
from megatron_dft.losses.vocab_statistics import Wanted, shard_statistics


def statistics_of_shard(
    logits_nV: Tensor,
    target_n: Tensor,
    vocab_start: int,
    want: Wanted,
    *,
    reference_nV: Tensor | None = None,
    exact_n: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(parts [S, C, n], the k largest logits [k, n], their columns [k, n]): the last two where the
    top k are wanted, S is 1 then. Arguments as in `part_statistics`; V may be 0."""
    rows, vocab = logits_nV.shape
    if vocab == 0:
        none = torch.empty(rows, 0, dtype=torch.float32, device=logits_nV.device)
        empty = shard_statistics(none, target_n, vocab_start, want, none, none)
        top = empty[want.rows()["top"]] if want.top_k else None
        found = None if top is None else torch.full_like(top, -1, dtype=torch.int64)
        return empty.unsqueeze(0), top, found
    given: dict[str, Any] = {"exact_n": exact_n, "ignore_index": ignore_index}
    parts, lanes = part_statistics(
        logits_nV, target_n, vocab_start, want, reference_nV=reference_nV, **given
    )
    if lanes is None:
        return parts, None, None
    top, found = likeliest(logits_nV, target_n, vocab_start, want.top_k, lanes, **given)
    return merge(parts, want, top).unsqueeze(0), top, found
