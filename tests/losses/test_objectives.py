"""Objectives on given token statistics: values, weights, gradients, masks, conversations."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dft.losses import registry
from megatron_dft.losses.token_stats import TokenStats
from tests.losses.reference import P_ONLY, PARAMETERS
from tests.ranks import run_ranks

NEEDS = ("entropy", "entropy_top20", "sum_sq_prob", "reference_log_prob", "kl")


def stats_of(log_prob, mask, **fields) -> TokenStats:
    """Statistics with harmless values for whatever an objective may need."""
    defaults = {name: torch.full_like(log_prob.detach(), 0.4) for name in NEEDS}
    defaults["reference_log_prob"] = log_prob.detach() - 0.1
    places = torch.arange(log_prob.numel(), device=log_prob.device).view(log_prob.shape)
    defaults["reward"] = torch.where(places % 2 == 0, 0.7, -0.4)
    return TokenStats(log_prob, mask, **{**defaults, **fields})


def objective_of(name: str):
    return registry.get(name.split("/")[0], **PARAMETERS[name])


def test_every_row_of_the_registry_is_under_test():
    assert {name.split("/")[0] for name in PARAMETERS} == set(registry.OBJECTIVES)


def test_dft_is_p_times_cross_entropy_with_the_gradient_of_minus_p():
    log_prob = torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss, weight = registry.get("dft")(TokenStats(log_prob, torch.ones(3)))
    p = log_prob.detach().exp()
    torch.testing.assert_close(loss.detach(), -p * p.log())
    torch.testing.assert_close(weight, p)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    # Without the detach it would be −p(1 + log p): of the other sign for p < 1/e.
    torch.testing.assert_close(gradient, -p)


def test_asft_is_dft_plus_lambda_times_the_divergence_and_its_gradient():
    log_prob = torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor([0.3, 2.0, torch.nan], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0])
    loss, weight = registry.get("asft", kl_weight=0.7)(TokenStats(log_prob, mask, kl=kl))
    p = log_prob.detach().exp()
    expected = -p * p.log() + 0.7 * kl.detach()
    torch.testing.assert_close(loss.detach(), torch.where(mask == 1, expected, 0.0))
    torch.testing.assert_close(weight, p * mask)
    upstream = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    of_log_prob, of_kl = torch.autograd.grad(loss, (log_prob, kl), upstream)
    torch.testing.assert_close(of_log_prob, -p * mask * upstream)
    torch.testing.assert_close(of_kl, 0.7 * mask * upstream)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_weight_is_the_gradient_and_ignored_tokens_do_not_matter(name):
    torch.manual_seed(0)
    log_prob = -3 * torch.rand(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.5
    mask[2] = False
    reference = log_prob - 0.3 * torch.randn(4, 6)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf, 7.0):
        fields = {
            "reference_log_prob": torch.where(mask, reference, garbage),
            "kl": torch.where(mask, 0.2, garbage),
            "entropy": torch.where(mask, 1.4, garbage),
            "entropy_top20": torch.where(mask, 1.2, garbage),
            "sum_sq_prob": torch.where(mask, 0.3, garbage),
            "reward": torch.where(mask, -0.3, garbage),
        }
        leaf = torch.where(mask, log_prob, garbage).requires_grad_()
        loss, weight = objective_of(name)(stats_of(leaf, mask.float(), **fields))
        upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.double())
        assert (loss[~mask] == 0).all() and (weight[~mask] == 0).all()
        torch.testing.assert_close(gradient, -weight * upstream, rtol=1e-12, atol=0)
        results.append((loss.detach(), weight, gradient))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_supervised_token_is_a_zero_loss_in_the_graph(name):
    for shape in ((2, 3), (0,), (0, 3)):
        leaf = torch.full(shape, torch.nan, requires_grad=True)
        loss, _ = objective_of(name)(stats_of(leaf, torch.zeros(shape)))
        loss.sum().backward()
        assert loss.sum() == 0 and leaf.grad is not None and not leaf.grad.any()


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(PARAMETERS)),
    values=st.lists(
        st.one_of(
            st.floats(-1e4, 0.0, width=32),
            st.sampled_from([-float("inf"), 0.0, 1e-6, -1e-30, -103.9, -88.0]),
        ),
        min_size=1,
        max_size=8,
    ),
    reference=st.floats(-1e4, 0.0, width=32),
    data=st.data(),
)
def test_weights_and_gradients_are_finite_for_any_log_probability(name, values, reference, data):
    log_prob = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    )
    stats = stats_of(log_prob, mask, reference_log_prob=torch.full_like(log_prob, reference))
    loss, weight = objective_of(name)(stats)
    loss.sum().backward()
    assert weight.isfinite().all(), (name, weight)
    assert (weight >= 0).all() or name.split("/")[0] in ("rift", "dpo"), (name, weight)
    assert log_prob.grad is not None and log_prob.grad.isfinite().all()
    # Only a certain miss (p = 0) with a weight that is not 0 may read inf; nothing may read NaN.
    assert not loss.isnan().any()
    assert (loss.isfinite() | (log_prob == -torch.inf) | ~mask).all()


def test_p_alpha_runs_from_cross_entropy_to_the_gradient_of_dft():
    log_prob = torch.tensor([-0.01, -2.0, -9.0], dtype=torch.float64)
    stats = TokenStats(log_prob, torch.ones(3))
    near_zero, _ = registry.get("p-alpha", alpha=1e-9)(stats)
    torch.testing.assert_close(near_zero, -log_prob, rtol=1e-7, atol=0)
    assert torch.equal(registry.get("p-alpha", alpha=0.0)(stats).loss, -log_prob)
    assert torch.equal(
        registry.get("p-alpha", alpha=1.0)(stats).weight, registry.get("dft")(stats).weight
    )


CONVERSATION_OBJECTIVES = [
    "dft-sequence", "dft-geometric", "iw-sft/sequence", "talr", "rift/sequence", "dpo", "dpo/mean"
]  # fmt: skip


def _packed_row():
    """Three conversations in one packed row of 16 and their statistics."""
    g = torch.Generator().manual_seed(5)
    return {
        "log_prob": -2 * torch.rand(1, 16, generator=g),
        "mask": torch.rand(1, 16, generator=g) < 0.7,
        "reference": -2 * torch.rand(1, 16, generator=g),
        "segments": torch.tensor([[0] * 3 + [1] * 8 + [2] * 5]),
    }


def _context_parallel(name, number):
    """This rank's columns as Megatron cuts them: one piece from the front, one from the back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    row = _packed_row()
    pieces = {k: v.chunk(2 * size, dim=1) for k, v in row.items()}
    mine = {k: torch.cat([p[rank], p[2 * size - 1 - rank]], dim=1) for k, p in pieces.items()}
    return objective_of(name)(
        stats_of(
            mine["log_prob"],
            mine["mask"],
            reference_log_prob=mine["reference"],
            segment_ids=mine["segments"],
            num_segments=number,
            context_parallel_group=dist.group.WORLD,
        )
    )


@pytest.mark.parametrize("name", CONVERSATION_OBJECTIVES)
@pytest.mark.parametrize("number", [None, 3])
def test_a_conversation_split_over_context_parallel_ranks_weighs_the_same(name, number):
    row = _packed_row()
    whole = objective_of(name)(
        stats_of(
            row["log_prob"],
            row["mask"],
            reference_log_prob=row["reference"],
            segment_ids=row["segments"],
        )
    )
    ranks = run_ranks(_context_parallel, 2, name, number)
    for i in range(2):
        (a, d), (b, c) = (rank[i].chunk(2, dim=1) for rank in ranks)
        torch.testing.assert_close(torch.cat([a, b, c, d], dim=1), whole[i], rtol=1e-6, atol=0)


def _last_conversation_on_one_rank():
    rank = dist.get_rank()
    return registry.get("dft-sequence")(
        TokenStats(
            torch.log(torch.tensor([[[0.5, 0.4]], [[0.2, 0.3]]]))[rank],
            torch.ones(1, 2),
            segment_ids=torch.tensor([[[0, 0]], [[0, 1]]])[rank],
            context_parallel_group=dist.group.WORLD,
        )
    ).weight


def test_a_rank_need_not_hold_a_token_of_every_conversation():
    first, second = run_ranks(_last_conversation_on_one_rank, 2)
    torch.testing.assert_close(first, torch.tensor([[0.04, 0.04]]))
    torch.testing.assert_close(second, torch.tensor([[0.04, 0.3]]))


def test_without_segment_ids_each_row_is_a_conversation():
    log_prob = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.4]]))
    _, weight = registry.get("dft-sequence")(TokenStats(log_prob, torch.ones(2, 2)))
    torch.testing.assert_close(weight, torch.tensor([[0.25, 0.25], [0.04, 0.04]]))


def _batch_median(values, mask, batch):
    rank = dist.get_rank()
    group = {"batch_group": dist.group.WORLD} if batch else {}
    return registry.get("talr", floor=0.0)(TokenStats(values[rank], mask[rank], **group)).weight


def test_talr_takes_the_lower_median_of_the_supervised_tokens_of_its_group():
    values = -torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for batch, medians in ((False, (1.0, 5.0)), (True, (4.0, 4.0))):
        ranks = run_ranks(_batch_median, 2, values, mask, batch)
        for rank, median in enumerate(medians):
            expected = torch.where(mask[rank].bool(), (values[rank] / median).exp(), 0.0)
            torch.testing.assert_close(ranks[rank], expected)


def test_a_weight_from_the_reference_does_not_move_with_the_model():
    reference = torch.tensor([-0.5, -2.0])
    for log_prob in (torch.tensor([-0.1, -9.0]), torch.tensor([-3.0, -0.2])):
        stats = TokenStats(log_prob, torch.ones(2), reference_log_prob=reference)
        loss, weight = registry.get("dft", weight_from="reference")(stats)
        torch.testing.assert_close(weight, reference.exp())
        torch.testing.assert_close(loss, -reference.exp() * log_prob)
    assert registry.get("dft", weight_from="reference").needs == {"reference_log_prob"}


def test_a_statistic_that_is_missing_is_named():
    with pytest.raises(ValueError, match="--loss eaft: needs entropy_top20"):
        registry.get("eaft")(TokenStats(torch.zeros(2), torch.ones(2)))


def test_objectives_of_the_probability_alone_need_nothing_else():
    for name in P_ONLY:
        assert not objective_of(name).needs
