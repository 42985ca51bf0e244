"""How much of a distribution is no likelier than the target: the signal of PriFT-mass (2606.09396).

u = Σ_v q(v)·1[q(v) ≤ q(y)], q the frozen reference: 1 where y is its first choice, q(y) where y is
its last. It takes the place of p in any weight that follows from p alone; PriFT-mass itself is
1[u ≥ 0.5]. Equally likely tokens count, as in the formula of the authors' repository (its code adds
q(y) alone to what is strictly below).

Shapes: T tokens, V this rank's part of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.vocab_statistics import row_chunks, statistics_dtype, target_position


@torch.no_grad()
def log_mass(
    logits_TV: Tensor,
    target_T: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """log u [T], fp32 (fp64 for fp64 logits), equal on all ranks; −inf where no shard holds the
    target.

    Args:
        logits_TV: this rank's shard, equally wide on all ranks of `group`; not changed.
        target_T: int64 ids in the whole vocabulary, the same on all ranks.
        vocab_start: id of the first column; None: shards in rank order.
        vocab_size: number of real tokens; columns from it on take no probability. None: all are.

    Two all-reduces of [2, T], chunk by chunk of the tokens.
    """
    vocab = logits_TV.shape[1]
    if vocab_start is None:
        vocab_start = 0 if group is None else dist.get_rank(group) * vocab
    real = vocab if vocab_size is None else min(max(vocab_size - vocab_start, 0), vocab)
    found = logits_TV.new_empty(len(logits_TV), dtype=statistics_dtype(logits_TV))
    for rows in row_chunks(len(logits_TV), vocab, None, logits_TV.device):
        logits = logits_TV[rows, :real].to(found.dtype)
        found[rows] = _chunk(logits, target_T[rows], group, vocab_start)
    return found


def _chunk(
    logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None, vocab_start: int
) -> Tensor:
    spread = group is not None and dist.get_world_size(group) > 1
    pair = logits_TV.new_full((2, len(logits_TV)), -torch.inf)
    if logits_TV.shape[1]:
        held, column = target_position(target_T, vocab_start, logits_TV.shape[1])
        own = logits_TV.gather(1, column.unsqueeze(1)).squeeze(1)
        pair[0] = torch.where(held, own, -torch.inf)
        pair[1] = logits_TV.amax(-1)
    if spread:
        dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
    target, largest = pair.unsqueeze(-1)
    prob = (logits_TV - largest).exp()
    sums = torch.stack([torch.where(logits_TV <= target, prob, 0.0).sum(-1), prob.sum(-1)])
    if spread:
        dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1].log()
