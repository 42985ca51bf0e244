"""Route 1's cross entropy against Megatron's, and the choice of a route."""

import doctest

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses import cross_entropy, route
from megatron_dft.losses.cross_entropy import vocab_parallel_cross_entropy
from tests.losses.interpreted import run_kernels
from tests.ranks import run_ranks

SEQUENCE, BATCH, VOCAB = 5, 2, 48


def _case() -> tuple:
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(SEQUENCE, BATCH, VOCAB, generator=g)
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=g)
    mask = torch.rand(BATCH, SEQUENCE, generator=g) < 0.7
    return logits, labels, mask, torch.rand(BATCH, SEQUENCE, generator=g)


def _both(dtype) -> tuple:
    """(loss, gradient) of Megatron's cross entropy and of ours; labels [b, s], as in a model."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as megatron

    logits, labels, mask, upstream = _case()
    logits = logits.to(dtype).chunk(dist.get_world_size(), -1)[dist.get_rank()]
    results = []
    leaf = logits.clone().requires_grad_()
    loss = megatron(leaf * 1.0, labels.t().contiguous(), tp_group=dist.group.WORLD).t()
    (loss * mask * upstream).sum().backward()
    results.append((loss.detach(), leaf.grad))
    leaf = logits.clone().requires_grad_()
    loss, found = vocab_parallel_cross_entropy(
        leaf * 1.0, labels.t(), dist.group.WORLD, mask=mask.t(), entropy=True
    )
    (loss.t() * upstream).sum().backward()
    results.append((loss.detach().t(), leaf.grad))
    return results, found.is_top1.t(), found.entropy.detach().t()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("run", [run_kernels, run_ranks], ids=["kernels", "torch"])
def test_it_is_megatrons_with_statistics_for_supervised_tokens(run, world_size):
    full, labels, mask, _ = _case()
    log_p = full.log_softmax(-1).transpose(0, 1)
    for (theirs, ours), is_top1, entropy in run(_both, world_size, torch.float32):
        torch.testing.assert_close(ours[0], torch.where(mask, theirs[0], 0.0))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
        assert torch.equal(is_top1, mask & (log_p.argmax(-1) == labels))
        expected = torch.where(mask, -(log_p.exp() * log_p).sum(-1), 0.0)
        torch.testing.assert_close(entropy, expected)


def test_the_route_that_is_fastest_within_the_memory():
    sizes = route.Sizes(8192, 131072, 4096, itemsize=2, kernels=True)
    whole = 8192 * 131072 * 2
    kept = route.choose(sizes, whole)
    assert (kept.name, kept.bytes, kept.recomputed) == ("head", whole, 0.0)
    cut = route.choose(sizes, whole // 2)
    assert cut.name == "head" and cut.bytes <= whole // 2 and 0.5 < cut.recomputed < 0.6
    # Where the logits fit for Megatron's layer and not beside the reference's, the faster fits.
    assert route.choose(sizes, whole, allowed=("logits",)).bytes == whole
    assert route.choose(sizes, whole // 2, allowed=("logits",)).bytes == whole
    cpu = route.Sizes(4096, 151936, 896, itemsize=4)
    assert route.choose(cpu, 1 << 40).name == "head"
    sharded = route.Sizes(4096, 75968, 896, itemsize=4, tensor_parallel=2)
    assert route.choose(sharded, 1 << 40).name == "logits"
    half = route.Sizes(4096, 75968, 896, itemsize=4, tensor_parallel=2, supervised=0.5)
    assert route.choose(half, 1 << 40).name == "head"
    with pytest.raises(ValueError, match="--loss-route"):
        route.choose(cpu, 1, allowed=())


def test_doctests():
    for module in (cross_entropy, route):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
