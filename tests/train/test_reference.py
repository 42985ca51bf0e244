"""Megatron's loop with DFT equals the same training in plain torch and transformers."""

import pytest
import torch

from tests.train import reference
from tests.train.launch import flags, largest_relative_error, run_train, weights

STEPS, BATCH = 5, 8


def _batches(model, data, order):
    rows = reference.read_rows(model, data)
    return [[rows[i] for i in order[s * BATCH : (s + 1) * BATCH]] for s in range(STEPS)]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory, tiny_model, chats):
    """Figures, weights, and which conversation stood at each sample number."""
    out = tmp_path_factory.mktemp("reference") / "out"
    curve = run_train(1, *flags(tiny_model, chats, loss="dft", save_hf=out))
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.tokenizer import load_tokenizer

    data = build_dataset(
        [str(chats)], load_tokenizer(tiny_model), seq_length=64, num_samples=40, seed=1234,
        packing=False,
    )  # fmt: skip
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
    return [step["lm loss"] for step in curve], weights(out), order


def test_five_steps_agree(megatron, tiny_model, chats):
    curve, trained, order = megatron
    expected, state = reference.train(tiny_model, _batches(tiny_model, chats, order))
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
def test_a_wrong_reference_does_not_agree(megatron, tiny_model, chats, wrong):
    curve, trained, order = megatron
    _, state = reference.train(tiny_model, _batches(tiny_model, chats, order), **wrong)
    assert largest_relative_error(trained, {k: state[k] for k in trained}) > 1e-3


def test_the_reference_loss_has_the_formula_s_gradient():
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels, mask = torch.arange(6), torch.tensor([1, 0, 1, 1, 0, 1.0], dtype=torch.float64)
    reference.dft_loss(logits, labels, mask).backward()
    softmax = logits.detach().softmax(-1)
    p = softmax.gather(-1, labels[:, None])
    expected = mask[:, None] * p * (softmax - torch.nn.functional.one_hot(labels, 11))
    assert torch.allclose(logits.grad, expected, atol=1e-14)
