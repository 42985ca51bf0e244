"""Padded vocabulary rows take no probability: p and the cross entropy equal transformers'."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_dft.hf.load import load_hf_weights
from megatron_dft.hf.padding import mask_padded_vocab, valid_columns
from megatron_dft.hf.source import open_checkpoint
from tests.hf import megatron_model
from tests.hf.test_round_trip import tokens
from tests.hf.tiny import make_tiny
from tests.ranks import run_ranks

VOCABULARY = 277


def labels() -> torch.Tensor:
    return tokens().roll(-1, dims=1)


def weights_for_tokens() -> torch.Tensor:
    return torch.rand(2, 19, generator=torch.Generator().manual_seed(5))


def loss_and_gradients(directory, tp, pad_to, masked=True):
    """Per-token cross entropy [b, s], and the gradients of Σ weight·CE for two weights."""
    megatron_model.start(tp)
    (model,) = megatron_model.build(directory, pad_to=pad_to)
    load_hf_weights([model], open_checkpoint(directory))
    if masked:
        mask_padded_vocab(model, VOCABULARY)
    t = tokens()
    loss = model(t, torch.arange(t.shape[1]).expand_as(t), None, labels=labels())
    (loss * weights_for_tokens()).sum().backward()
    head = model.output_layer.weight.grad
    gathered = [torch.empty_like(head) for _ in range(tp)]
    dist.all_gather(gathered, head)
    norm = model.decoder.final_layernorm.weight.grad
    return loss.detach(), torch.cat(gathered), norm


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    directory = make_tiny("llama", tmp_path_factory.mktemp("tiny"), vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(directory)
    logits = model(tokens()).logits
    loss = F.cross_entropy(logits.transpose(1, 2), labels(), reduction="none")
    (loss * weights_for_tokens()).sum().backward()
    return directory, loss.detach(), model.lm_head.weight.grad, model.model.norm.weight.grad


# 277 padded to 280, 384, 512: at (4, 128) the last of four ranks holds nothing but padding
@pytest.mark.parametrize(("tp", "pad_to"), [(1, 8), (1, 128), (2, 8), (2, 128), (4, 128)])
def test_loss_and_gradients_equal_transformers(tp, pad_to, reference):
    directory, expected, head, norm = reference
    for loss, head_gradient, norm_gradient in run_ranks(
        loss_and_gradients, tp, directory, tp, pad_to
    ):
        assert (loss - expected).abs().max() <= 1e-5
        assert ((-loss).exp() - (-expected).exp()).abs().max() <= 1e-6
        assert head_gradient.isfinite().all()
        assert (head_gradient[:VOCABULARY] - head).abs().max() <= 1e-5
        assert (head_gradient[VOCABULARY:] == 0).all()
        assert (norm_gradient - norm).abs().max() <= 1e-5


def test_without_the_mask_padding_takes_probability(reference):
    directory, expected, _, _ = reference
    loss = run_ranks(loss_and_gradients, 1, directory, 1, 128, masked=False)[0][0]
    assert (loss - expected).abs().max() > 1e-3


def test_valid_columns():
    assert [valid_columns(128, 277, r) for r in range(4)] == [128, 128, 21, 0]


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x @ self.weight.T, None


class Model(torch.nn.Module):
    vocab_size = 5

    def __init__(self):
        super().__init__()
        self.output_layer = Head()


def test_gradient_of_masked_columns_is_zero_whatever_the_loss():
    """A loss that is no softmax, and an expanded gradient whose elements share memory."""
    model = Model()
    mask_padded_vocab(model, 4)
    logits, _ = model.output_layer(torch.ones(2, 3))
    assert (logits[:, 4] == float("-inf")).all() and logits[:, :4].isfinite().all()
    logits.backward(torch.ones(1, 1).expand(2, 5))
    assert torch.equal(model.output_layer.weight.grad[4], torch.zeros(3))
    assert torch.equal(model.output_layer.weight.grad[:4], torch.full((4, 3), 2.0))


def test_no_hook_changes_a_vocabulary_without_padding():
    model = Model()
    mask_padded_vocab(model, 5)
    assert model.output_layer(torch.ones(2, 3))[0].isfinite().all()
    with pytest.raises(ValueError, match="larger"):
        mask_padded_vocab(model, 6)


def test_a_chunk_without_output_layer_is_left_alone():
    mask_padded_vocab(torch.nn.Linear(2, 2), 4)
