"""The start-up self-test: green for every objective in its route, red where its weight is lost."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dft.losses import registry, weighting
from tests.ranks import run_ranks

VOCABULARY, HIDDEN = 300, 32
KL = [name for name, entry in registry.OBJECTIVES.items() if "kl" in entry.needs]
CASES = {name: (name, {}, 0.0) for name in registry.OBJECTIVES} | {
    "iw-sft by conversation": ("iw-sft", dict(level="sequence"), 0.0),
    "dft and a KL": ("dft", {}, 0.3),
}


def _model(objective, sequence_parallel):
    """The parts of a GPTModel that the self-test touches, with Megatron's own cross entropy."""
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_dft.step.logits_probe import LogitsProbe

    group = mpu.get_tensor_model_parallel_group()

    def compute_language_model_loss(labels, logits):
        loss = vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous(), 0.0, group)
        return loss.transpose(0, 1).contiguous()

    model = SimpleNamespace(
        pg_collection=SimpleNamespace(tp=group),
        config=SimpleNamespace(cross_entropy_loss_fusion=False, hidden_size=HIDDEN),
        output_layer=SimpleNamespace(
            output_size_per_partition=VOCABULARY // group.size(),
            sequence_parallel=sequence_parallel,
        ),
        parameters=lambda: iter([torch.zeros(1, device="cuda")]),
        compute_language_model_loss=compute_language_model_loss,
        training=True,
    )
    LogitsProbe(model, objective)
    return model


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


def _run(cases, chunked, dtype=torch.float32, packing=True, how=None, cp=1, sp=False):
    from megatron_dft.cpu import runtime

    runtime.activate()
    _break(how)
    return run(cases, chunked, dtype, packing, cp, sp)


def run(cases, chunked, dtype, packing=True, cp=1, sp=False):
    """case → the self-test's error, or the message with which it ends the run."""
    from megatron.core import parallel_state as mpu

    from megatron_dft.step import chunked_head
    from megatron_dft.step.self_test import SelfTest

    world = torch.distributed.get_world_size()
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=world // cp, context_parallel_size=cp
        )
    found = {}
    for case in cases:
        name, parameters, kl_coeff = CASES[case]
        objective = registry.get(name, **parameters)
        settings = SimpleNamespace(objective=objective, vocab_size=VOCABULARY)
        chunked_head.settings = lambda s=settings: s
        chunked_head.get_args = lambda: SimpleNamespace(loss_chunk_size=7)
        test = SelfTest(_model(objective, sp), objective, VOCABULARY, dtype, packing, kl_coeff)
        try:
            found[case] = test.run(chunked)
        except RuntimeError as error:
            found[case] = str(error)
    return found


ROUTE_2 = [case for case, (name, _, kl) in CASES.items() if name not in KL and not kl]


@pytest.mark.parametrize("packing", [True, False])
def test_every_objective_in_route_1(packing):
    for rank in run_ranks(_run, 2, list(CASES), False, packing=packing):
        assert all(isinstance(error, float) and error < 1e-5 for error in rank.values()), rank


def test_every_objective_over_context_ranks_and_in_bf16():
    (rank, _) = run_ranks(_run, 2, list(CASES), False, torch.bfloat16, cp=2)
    assert all(isinstance(error, float) for error in rank.values()), rank


@pytest.mark.parametrize(("ranks", "sp"), [(1, False), (2, True)])
def test_every_objective_in_route_2(ranks, sp):
    for rank in run_ranks(_run, ranks, ROUTE_2, True, sp=sp):
        assert all(isinstance(error, float) and error < 1e-4 for error in rank.values()), rank


def test_every_objective_in_route_2_in_bf16():
    (rank,) = run_ranks(_run, 1, ROUTE_2, True, torch.bfloat16, packing=False)
    assert all(isinstance(error, float) for error in rank.values()), rank


@pytest.mark.parametrize("chunked", [False, True])
def test_red_for_each_objective_whose_weight_is_dropped(chunked):
    cases = ROUTE_2 if chunked else list(CASES)
    # At two ranks, so that the chunked head takes the weight from autograd.
    for rank in run_ranks(_run, 2, cases, chunked, how="weight"):
        for case, outcome in rank.items():
            if case == "sft":  # has none
                assert isinstance(outcome, float)
            else:
                assert f"--loss {CASES[case][0]}: self-test failed" in str(outcome), case


@pytest.mark.parametrize("how", ["hidden", "dW"])
def test_red_where_a_gradient_of_the_head_is_lost(how):
    for rank in run_ranks(_run, 2, ["sft", "dft"], True, how=how, sp=True):
        assert all("self-test failed" in str(outcome) for outcome in rank.values()), rank


def test_red_where_the_gradient_of_the_kl_is_lost():
    (rank,) = run_ranks(_run, 1, ["asft", "dft and a KL", "dft"], False, how="kl")
    assert "self-test failed" in str(rank["asft"]) and "self-test failed" in str(
        rank["dft and a KL"]
    )
    assert isinstance(rank["dft"], float)
