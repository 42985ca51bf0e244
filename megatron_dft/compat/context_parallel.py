"""Which tokens of a row a context-parallel rank holds.

Megatron cuts every sequence into 2·cp chunks and gives rank r the chunks r and 2·cp−1−r, so that
causal work is balanced (core/utils.py, get_batch_on_this_cp_rank). A packed row is cut so
conversation by conversation. Transformer Engine's attention expects this order; so does the CPU
attention.
"""

import torch
from torch import Tensor


def token_indices(
    length: int, size: int, rank: int, boundaries: Tensor | None, device: torch.device
) -> Tensor:
    """Global positions [length / size] of the tokens that `rank` of `size` holds.

    `length`: global tokens of a row; `boundaries`: cu_seqlens [n+1] of a packed row (global, padded
    so that each conversation divides by 2·size), or None for one sequence a row.
    """
    edges = [0, length] if boundaries is None else boundaries.tolist()
    if edges[-1] < length:
        edges.append(length)
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        chunks = torch.arange(start, end, device=device).chunk(2 * size) if end > start else ()
        if (end - start) % (2 * size):
            raise ValueError(
                f"--context-parallel-size {size}: each conversation's padded length must divide by "
                f"{2 * size}, got {end - start}; pad it in the data set"
            )
        if chunks:
            parts += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(parts)
