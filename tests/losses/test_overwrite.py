"""overwrite_logits: e^{z−m} and then the gradient take the logits' storage."""

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses.vocab_parallel import vocab_parallel_dft_loss, vocab_shard_start
from tests.ranks import run_ranks

TOKENS, VOCAB = 7, 24
BORDERS = {1: [0, 24], 2: [0, 5, 24], 4: [0, 6, 6, 13, 24]}  # uneven, and one shard of no token


def _case():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator)
    logits[:, 5] += 90.0  # the shards' own maxima lie far apart
    logits[2, :6] = -torch.inf
    logits[4, 6:] = -torch.inf
    target = torch.tensor([5, 23, 9, 6, 2, 0, 13])
    return logits, target, torch.randn(TOKENS, generator=generator)


def _sharded(overwrite):
    logits, target, upstream = _case()
    borders = BORDERS[dist.get_world_size()]
    shard = slice(borders[dist.get_rank()], borders[dist.get_rank() + 1])
    leaf = logits[:, shard].clone().requires_grad_()
    start = vocab_shard_start(leaf.shape[1], dist.group.WORLD)
    given = leaf * 1.0
    before = given.detach().clone()
    loss, _ = vocab_parallel_dft_loss(
        given, target, dist.group.WORLD, vocab_start=start, chunk_bytes=4 * VOCAB * 3,
        overwrite_logits=overwrite,
    )  # fmt: skip
    kept = torch.equal(given.detach(), before)
    loss.backward(upstream)
    return loss.detach(), leaf.grad, kept, torch.equal(given.detach(), leaf.grad)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradient_in_place_is_the_dense_one(world_size):
    logits, target, upstream = _case()
    exact = logits.double().requires_grad_()
    log_prob = exact.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    expected = -log_prob.detach().exp() * log_prob
    (expected * upstream).sum().backward()
    for overwrite in (False, True):
        ranks = run_ranks(_sharded, world_size, overwrite)
        gradient = torch.cat([rank[1] for rank in ranks], dim=1).double()
        for rank in ranks:
            torch.testing.assert_close(rank[0].double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, exact.grad, rtol=1e-5, atol=1e-7)
        if overwrite:  # the storage really is used: from the forward on, and for the gradient
            assert all(rank[3] for rank in ranks) and not all(rank[2] for rank in ranks)
        else:
            assert all(rank[2] for rank in ranks)


def test_without_a_gradient_to_take_the_logits_are_kept():
    logits, target, _ = _case()
    before = logits.clone()
    with torch.no_grad():
        vocab_parallel_dft_loss(logits, target, overwrite_logits=True)
    assert torch.equal(logits, before)
