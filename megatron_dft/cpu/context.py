"""Context parallelism of the CPU attention: gathered keys and values, and who may see whom."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.compat.context_parallel import token_indices


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
