"""A cross entropy that is no −log p stops the run, whatever weight the objective gives it."""

import pytest
import torch

from megatron_dft.losses import registry
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.step.loss import checked

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("bad", [INF, NAN, -INF, -0.5])
@pytest.mark.parametrize("name", ["dft", "nll-threshold", "chord-phi"])
def test_what_a_weight_hides_is_found(name, bad):
    cross_entropy = torch.tensor([[0.3, bad, 2.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    loss = registry.get(name)(TokenStats(-cross_entropy, mask)).loss.sum()
    if bad == INF:
        assert loss.isfinite(), "nothing would be hidden here"
    assert checked(loss, cross_entropy, mask).isnan()


@pytest.mark.parametrize("ignored", [INF, NAN, -7.0])
def test_what_is_not_supervised_does_not_count(ignored):
    cross_entropy = torch.tensor([[0.3, ignored, 0.0, -1e-4, 88.7]])
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    loss = torch.tensor(4.25, requires_grad=True)
    found = checked(loss, cross_entropy, mask)
    assert found.item() == 4.25 and not found.requires_grad


def test_a_bad_loss_stays_bad():
    fine = torch.ones(1, 2)
    assert checked(torch.tensor(NAN), fine, fine).isnan()
    assert checked(torch.tensor(INF), fine, fine).isinf()


def test_no_device_is_waited_for():
    """Meta tensors have no values: reading one would raise."""
    meta = torch.ones(2, 3, device="meta")
    assert checked(meta.sum(), meta, meta).is_meta
