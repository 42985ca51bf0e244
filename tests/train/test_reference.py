"""Megatron's loop with DFT equals the same training in plain torch and transformers."""

import functools

import pytest
import torch

from tests.train import reference
from tests.train.launch import flags, largest_relative_error, run_train, weights

STEPS, BATCH = 5, 8


@pytest.fixture(scope="module")
def batches(tiny_model, chats):
    """The conversations of each step, in the order that Megatron's sampler reads them."""
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.tokenizer import load_tokenizer

    data = build_dataset(
        [chats],
        load_tokenizer(tiny_model),
        DatasetOptions(
            seq_length=64,
            num_samples=STEPS * BATCH,
            seed=1234,
            packing=False,
        ),
    )
    rows = reference.read_rows(tiny_model, chats)
    order = []
    for index in range(STEPS * BATCH):
        (member,) = (int(m) for m in data.plan.members(index))
        ids, trained = rows[member]
        # The reference wrote the chat template out by hand: same tokens, same mask.
        size = int(data[index]["loss_mask"].nonzero().max()) + 1
        assert data[index]["tokens"][:size].tolist() == ids[:size]
        assert data[index]["loss_mask"][:size].tolist() == trained[1 : size + 1]
        assert sum(trained[size + 1 :]) == 0
        order.append(member)
    return [[rows[i] for i in order[s * BATCH : (s + 1) * BATCH]] for s in range(STEPS)]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory, tiny_model, chats):
    out = tmp_path_factory.mktemp("reference") / "out"
    curve = run_train(1, *flags(tiny_model, chats, loss="dft", save_hf=out))
    return [step["lm loss"] for step in curve], weights(out)


def test_five_steps_agree(megatron, tiny_model, batches):
    curve, trained = megatron
    expected, state = reference.train(tiny_model, batches)
    assert curve == pytest.approx(expected, abs=1e-4)
    assert largest_relative_error(trained, {k: state[k] for k in trained}) <= 1e-4


def _without_detach(logits, labels, mask):
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (-log_p.exp() * log_p * mask).sum()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss=_without_detach),
        # Clipping hides a constant factor: without it Σp as the normaliser scales every step.
        dict(normaliser=lambda mass, number: mass),
    ],
    ids=["no detach", "divided by the sum of p"],
)
def test_a_wrong_reference_does_not_agree(megatron, tiny_model, batches, wrong):
    _, trained = megatron
    _, state = reference.train(tiny_model, batches, **wrong)
    assert largest_relative_error(trained, {k: state[k] for k in trained}) > 1e-3


def test_the_reference_loss_has_the_formula_s_gradient():
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels, mask = torch.arange(6), torch.tensor([1, 0, 1, 1, 0, 1.0], dtype=torch.float64)
    reference.dft_loss(logits, labels, mask).backward()
    softmax = logits.detach().softmax(-1)
    p = softmax.gather(-1, labels[:, None])
    expected = mask[:, None] * p * (softmax - torch.nn.functional.one_hot(labels, 11))
    assert torch.allclose(logits.grad, expected, atol=1e-14)


# A learning rate at which the model leaves its base within five steps, so that there is a KL.
FAR = 2e-2


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        (
            dict(loss="asft", dft_asft_lambda=0.5),
            functools.partial(reference.asft_loss, kl_weight=0.5),
        ),
        (dict(loss="dft", kl_coeff=0.5), functools.partial(reference.asft_loss, kl_weight=0.5)),
        (dict(loss="iw-sft"), reference.iw_sft_loss),
        (dict(loss="dft", dft_weight_from="reference"), reference.prift_loss),
        (
            dict(
                loss="nll-threshold",
                dft_threshold=0.5,
                dft_weight_from="reference-mass",
                loss_route="head",
            ),
            reference.prift_mass_loss,
        ),
        (
            dict(loss="target-sft", dft_target_eta=0.6, loss_route="head"),
            functools.partial(reference.target_loss, eta=0.6),
        ),
    ],
    ids=[
        "asft",
        "dft with --kl-coeff",
        "iw-sft",
        "dft by the base's p",
        "prift-mass",
        "target-sft",
    ],
)
def test_losses_that_compare_with_the_base(tiny_model, chats, batches, tmp_path, given, loss):
    """The frozen model of the training loop against two dense models in transformers."""
    out = tmp_path / "out"
    curve = run_train(1, *flags(tiny_model, chats, save_hf=out, lr=FAR, min_lr=FAR, **given))
    expected, state = reference.train(tiny_model, batches, loss, lr=FAR, base=True)
    assert [step["lm loss"] for step in curve] == pytest.approx(expected, abs=1e-4)
    trained = weights(out)
    assert largest_relative_error(trained, {k: state[k] for k in trained}) <= 1e-3
    if "dft/kl" in curve[0]:
        assert curve[0]["dft/kl"] == pytest.approx(0, abs=1e-6) and curve[-1]["dft/kl"] > 1e-2


LAYOUTS = {
    "tp2-sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "cp2": dict(context_parallel_size=2),
}


@pytest.fixture(scope="module")
def compared(tiny_model, chats):
    @functools.cache
    def run(layout, loss):
        given = LAYOUTS.get(layout, {})
        argv = flags(tiny_model, chats, loss=loss, lr=FAR, min_lr=FAR, **given)
        return run_train(2 if given else 1, *argv)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["asft", "psft"])
def test_the_frozen_model_in_other_layouts(compared, layout, loss):
    for ours, theirs in zip(compared(layout, loss), compared("single", loss), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_chunked_head_compares_too(compared, tiny_model, chats):
    argv = flags(tiny_model, chats, loss="psft", lr=FAR, min_lr=FAR, loss_chunk_size=16)
    got = run_train(2, *argv, "--tensor-model-parallel-size", "2")
    for ours, theirs in zip(got, compared("single", "psft"), strict=True):
        for name in ("lm loss", "psft loss", "dft/mean-weight"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
