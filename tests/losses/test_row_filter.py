"""The row filter drops no more of the gradient than its bound, and drops something."""

import pytest
import torch

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.row_filter import RowFilter, in_place_order
from tests.losses.interpreted import run_kernels
from tests.ranks import run_ranks

TOKENS, HIDDEN, VOCAB = 24, 24, 70


def _case() -> tuple:
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(VOCAB, HIDDEN, generator=g)
    labels = torch.randint(VOCAB, (TOKENS,), generator=g)
    # From tokens that the model would never say to tokens of which it is sure.
    hidden = torch.randn(TOKENS, HIDDEN, generator=g)
    hidden += (
        torch.linspace(-0.8, 1.4, TOKENS)[torch.randperm(TOKENS, generator=g), None]
        * (weight[labels])
    )
    return hidden, weight, labels, torch.rand(TOKENS, generator=g) + 0.5


def _gradients(bound, memory, name, design) -> tuple:
    hidden, weight, labels, upstream = _case()
    hidden.requires_grad_(), weight.requires_grad_()
    row_filter = None if bound is None else RowFilter(bound)
    out = linear_head_loss(
        hidden, weight, labels, objective=registry.get(name), mask=labels >= 0,
        loss_memory=memory, row_filter=row_filter, design=design,
    )  # fmt: skip
    out.loss.backward(upstream)
    share = None if row_filter is None else row_filter.take()
    return out.loss.detach(), hidden.grad, weight.grad, share


@pytest.mark.parametrize(("run", "design"), [(run_kernels, "keep"), (run_ranks, "recompute")])
def test_what_is_dropped_is_within_the_bound(run, design):
    hidden, weight, labels, upstream = _case()
    for bound, memory, name in (
        (1e-4, 1 << 20, "dft"),
        (1e-2, 5500, "dft"),
        (0.2, 1 << 20, "sft"),
    ):
        loss, d_hidden, d_weight, share = run(_gradients, 1, bound, memory, name, design)[0]
        full_loss, full_hidden, full_weight, _ = run(_gradients, 1, None, memory, name, design)[0]
        assert torch.equal(loss, full_loss), "the value does not change"
        log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
        p = log_p.exp()
        chosen = p.gather(1, labels.unsqueeze(1))
        onehot = torch.nn.functional.one_hot(labels, VOCAB)
        w = upstream.double().unsqueeze(1) * (chosen if name == "dft" else 1.0)
        d_logits = w * (p - onehot)
        mass = d_logits.abs().sum(1)
        torch.testing.assert_close(mass, (2 * w * (1 - chosen)).squeeze(1))
        dropped = (d_hidden == 0).all(1)
        assert dropped.any() and share == dropped.double().mean()
        assert mass[dropped].sum() <= bound * mass.sum()
        # One more row would have been too much.
        assert mass[dropped].sum() + mass[~dropped].min() > bound * mass.sum()
        torch.testing.assert_close(d_hidden[~dropped], full_hidden[~dropped])
        kept = torch.where(dropped.unsqueeze(1), 0.0, d_logits)
        torch.testing.assert_close(
            d_weight.double(), kept.t() @ hidden.double(), rtol=1e-4, atol=1e-5
        )
        # The bound on the gradient of the logits carries over to dW by the hidden states' size.
        error = (d_weight - full_weight).abs().sum(0)
        assert (error <= bound * mass.sum() * hidden.abs().amax(0) * (1 + 1e-4) + 1e-6).all()


def test_rows_are_moved_into_holes_that_nobody_reads():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = int(torch.randint(1, 20, (1,), generator=g))
        kept = (torch.rand(rows, generator=g) < 0.6).nonzero().squeeze(1)
        order = in_place_order(kept, rows)
        assert order.sort().values.tolist() == kept.tolist()
        written = set(range(len(kept)))
        for place, source in enumerate(order.tolist()):
            assert source == place or source not in written


def test_a_bound_that_is_none_and_a_kl_term_are_refused():
    with pytest.raises(ValueError, match="--loss-row-filter: expected a share"):
        RowFilter(1.0)
    hidden, weight, labels, _ = _case()
    with pytest.raises(ValueError, match="--loss-row-filter: its bound"):
        linear_head_loss(
            hidden, weight, labels, objective=registry.get("asft"), row_filter=RowFilter(1e-4),
            reference_logits=torch.zeros(TOKENS, VOCAB),
        )  # fmt: skip


def test_a_row_that_is_not_a_number_keeps_every_row():
    upstream = torch.tensor([0.0, 1.0, torch.nan])
    assert RowFilter(0.5).kept(upstream, torch.tensor([-1.0, -1.0, -1.0])).tolist() == [0, 1, 2]
