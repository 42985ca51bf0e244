"""The start-up self-test: green for every objective in its route, red where its weight is lost."""

import pytest
import torch

from megatron_dft.losses import weighting
from tests.ranks import run_ranks
from tests.step.stand_in import CASES, run


def _break(how):
    if how == "weight":  # the gradient of plain cross entropy, whatever the objective
        weighting._WeightedTokenLoss.backward = staticmethod(
            lambda ctx, *grads: (-grads[0], None, None)
        )
    if how == "kl":
        from megatron_dft.losses import vocab_gradient

        plain = vocab_gradient.LogitGradient.set_upstream

        def set_upstream(self, *grads):
            return plain(self, *grads[:-1], None)

        vocab_gradient.LogitGradient.set_upstream = set_upstream
    if how in ("hidden", "dW"):
        from megatron_dft.losses import linear_recompute

        plain_gradients = linear_recompute.linear_gradients

        def linear_gradients(*args):
            d_hidden, d_weight = plain_gradients(*args)
            broken = d_hidden if how == "hidden" else d_weight
            broken[: len(broken) // 2] = 0.0
            return d_hidden, d_weight

        linear_recompute.linear_gradients = linear_gradients


def _run(cases, chunked, dtype=torch.float32, packing=True, how=None, cp=1, sp=False, own=False):
    from megatron_dft.cpu import runtime

    runtime.activate()
    _break(how)
    return run(cases, chunked, dtype, packing, cp, sp, own)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_every_objective_in_route_1(packing, own):
    for rank in run_ranks(_run, 2, list(CASES), False, packing=packing, own=own):
        assert all(isinstance(error, float) and error < 1e-5 for error in rank.values()), rank


def test_every_objective_over_context_ranks_and_in_bf16():
    (rank, _) = run_ranks(_run, 2, list(CASES), False, torch.bfloat16, cp=2)
    assert all(isinstance(error, float) for error in rank.values()), rank


@pytest.mark.parametrize(("ranks", "sp"), [(1, False), (2, True)])
def test_every_objective_in_route_2(ranks, sp):
    for rank in run_ranks(_run, ranks, list(CASES), True, sp=sp):
        assert all(isinstance(error, float) and error < 1e-4 for error in rank.values()), rank


def test_every_objective_in_route_2_in_bf16():
    (rank,) = run_ranks(_run, 1, list(CASES), True, torch.bfloat16, packing=False)
    assert all(isinstance(error, float) for error in rank.values()), rank


@pytest.mark.parametrize("chunked", [False, True])
def test_red_for_each_objective_whose_weight_is_dropped(chunked):
    # At two ranks, so that the chunked head takes the weight from autograd.
    for rank in run_ranks(_run, 2, list(CASES), chunked, how="weight"):
        for case, outcome in rank.items():
            if case == "sft":  # has none
                assert isinstance(outcome, float)
            else:
                assert f"--loss {CASES[case][0]}: self-test failed" in str(outcome), case


@pytest.mark.parametrize("how", ["hidden", "dW"])
def test_red_where_a_gradient_of_the_head_is_lost(how):
    for rank in run_ranks(_run, 2, ["sft", "dft"], True, how=how, sp=True):
        assert all("self-test failed" in str(outcome) for outcome in rank.values()), rank


@pytest.mark.parametrize("own", [False, True])
def test_red_where_the_gradient_of_the_kl_is_lost(own):
    (rank,) = run_ranks(_run, 1, ["asft", "dft and a KL", "dft"], False, how="kl", own=own)
    assert "self-test failed" in str(rank["asft"]) and "self-test failed" in str(
        rank["dft and a KL"]
    )
    assert isinstance(rank["dft"], float)
