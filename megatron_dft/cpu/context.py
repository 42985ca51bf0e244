"""Which tokens a context-parallel rank holds, and the gathering of keys and values over the ranks.

Megatron cuts every sequence into 2·cp chunks and gives rank r the chunks r and 2·cp−1−r, so that
causal work is balanced (core/utils.py, get_batch_on_this_cp_rank); a packed row is cut so conversation
by conversation.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherSequence(torch.autograd.Function):
    """All-gather along axis 0 over a group; the gradient is the reduce-scattered sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather(list(out.chunk(group.size())), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        # gloo has no reduce-scatter for every dtype; all-reduce and keep this rank's part.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


def gather_kv(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[s/cp, b, g, d] each → [s, b, g, d], in rank order (not in sequence order)."""
    if group.size() == 1:
        return key, value
    return _GatherSequence.apply(key, group), _GatherSequence.apply(value, group)


def token_indices(
    length: int, size: int, rank: int, boundaries: Tensor | None, device: torch.device
) -> Tensor:
    """Global positions [length / size] of the tokens that `rank` of `size` holds.

    `length`: global tokens of a row; `boundaries`: cu_seqlens [n+1] of a packed row (global, padded so
    that each conversation divides by 2·size), or None for one sequence a row.
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


def visible_keys(
    local_length: int,
    group: dist.ProcessGroup,
    boundaries: Tensor | None,
    window: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    """Bool [s/cp, s]: may this rank's query see that gathered key (in `gather_kv`'s order)?

    Causal, inside the same conversation, and at most `window[0]` tokens back (−1: no limit).
    """
    size = group.size()
    length = local_length * size
    if size == 1:
        rows = columns = torch.arange(length, device=device)
    else:
        held = [token_indices(length, size, r, boundaries, device) for r in range(size)]
        rows, columns = held[group.rank()], torch.cat(held)
    visible = columns[None, :] <= rows[:, None]
    if boundaries is not None:
        conversation = torch.bucketize(
            torch.arange(length, device=device), boundaries[1:].to(device), right=True
        )
        visible &= conversation[columns][None, :] == conversation[rows][:, None]
    if window is not None and window[0] >= 0:
        visible &= rows[:, None] - columns[None, :] <= window[0]
    return visible
