"""vocab_parallel against dense float64 references: values and gradients at TP 1, 2 and 4."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dft.losses import registry, vocab_parallel
from megatron_dft.losses.vocab_parallel import (
    vocab_parallel_dft_loss,
    vocab_parallel_loss,
    vocab_parallel_statistics,
)
from tests.losses.reference import HAS_KL, PARAMETERS, relative_error
from tests.losses.vocab_cases import (
    TOKENS,
    TOLERANCE,
    VOCAB,
    _statistics,
    all_objectives,
    exact,
    exact_statistics,
    make_case,
    shared_by_equals,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_objective_equals_the_dense_float64_one(world_size):
    runs = [(name, seed, dtype) for seed, name in enumerate(PARAMETERS) for dtype in TOLERANCE]
    ranks = run_ranks(all_objectives, world_size, runs)
    for i, (name, seed, dtype) in enumerate(runs):
        case = make_case(seed, dtype)
        loss, gradient = exact(name, case)
        tolerance = TOLERANCE[dtype]
        got = torch.cat([rank[i][2] for rank in ranks], dim=1)
        assert got.dtype == dtype
        if name in HAS_KL:  # where p ≈ q, p − q is a small difference: measured over the tensor
            got_rows, gradient = got.flatten(), gradient.flatten()
        else:
            got_rows = got
        assert relative_error(got_rows, gradient) <= tolerance, (name, "gradient")
        for rank in ranks:
            assert relative_error(rank[i][0], loss) <= 1e-5, (name, "value")
            assert torch.equal(rank[i][1], ranks[0][i][1]), (name, "weight differs between ranks")
        assert (got[case["target"] == -100] == 0).all(), name


@pytest.mark.parametrize("borders", [[0, 64], [0, 7, 64], [0, 30, 31, 31, 64]])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_statistics_and_their_gradients_on_uneven_shards_with_one_collective(borders, dtype):
    case = make_case(3, dtype)
    case["logits"][:, 5:9] = -torch.inf  # excluded tokens, among them …
    case["target"][case["target"].clamp(min=0).sub(7).abs() <= 2] = -100  # … no target
    case["reference"][:, 5:9] = -torch.inf
    supervised = case["target"] != -100
    logits, values = exact_statistics(case)
    upstream = torch.where(supervised, case["upstream"], 0.0)
    ranks = run_ranks(_statistics, len(borders) - 1, case, borders, case["upstream"], list(values))
    total = torch.zeros_like(logits)
    for i, (name, value) in enumerate(values.items()):
        (gradient,) = torch.autograd.grad(value, logits, upstream.double(), retain_graph=True)
        total += gradient
        for rank in ranks:
            got = rank[0][i]
            assert (got[~supervised] == 0).all()
            assert relative_error(got[supervised], value[supervised]) <= 1e-5, name
        got = torch.cat([rank[1][i] for rank in ranks], dim=1)
        if name == "entropy_top20":
            got, gradient = shared_by_equals(got, logits), shared_by_equals(gradient, logits)
        assert relative_error(got, gradient) <= TOLERANCE[dtype], name
    got = shared_by_equals(torch.cat([rank[2] for rank in ranks], dim=1), logits)
    assert relative_error(got, shared_by_equals(total, logits)) <= TOLERANCE[dtype]
    chosen = logits.gather(1, case["target"].clamp(min=0).unsqueeze(1)).squeeze(1)
    top1 = chosen == logits.amax(-1)
    for rank in ranks:
        assert torch.equal(rank[5], top1 & supervised)
        expected = {"all_gather_into_tensor": 1} if len(ranks) > 1 else {}
        assert rank[3] == expected, "one statistics collective in the forward"
        assert rank[4] == expected, "none in the backward"


def test_layouts_that_are_not_contiguous_are_neither_copied_nor_changed():
    case = make_case(1, torch.float32)
    base = case["logits"][:20].view(4, 5, VOCAB).contiguous()
    target = case["target"][:20].view(4, 5)
    plain = base.clone().requires_grad_()
    expected, _ = vocab_parallel_dft_loss(plain, target)
    expected.sum().backward()
    wide = torch.randn(4, 5, VOCAB + 3)
    wide[..., :VOCAB] = base
    for view, order in (
        (base.transpose(0, 1), (1, 0)),
        (wide[..., :VOCAB], (0, 1)),
        (base.transpose(1, 2).contiguous().transpose(1, 2), (0, 1)),
    ):
        before = view.clone()
        logits = view.detach().requires_grad_()
        loss, _ = vocab_parallel_dft_loss(logits, target.permute(order))
        loss.sum().backward()
        assert torch.equal(loss.permute(order), expected)
        assert torch.equal(logits.grad.permute(*order, 2), plain.grad)
        assert torch.equal(view, before)


def test_shapes_that_do_not_fit_are_refused_with_the_way_out():
    logits, target = torch.randn(4, 5, VOCAB), torch.zeros(4, 5, dtype=torch.int64)
    for wrong, message in (
        (target.t(), r"target: expected the shape \(4, 5\).*transpose it: target.t\(\)"),
        (target[:, 1:], r"logits\[:, :-1\] go with ids\[:, 1:\]"),
    ):
        with pytest.raises(ValueError, match=message):
            vocab_parallel_dft_loss(logits, wrong)
    with pytest.raises(ValueError, match=r"reference_log_prob: expected the shape \(4, 5\)"):
        turned = {"reference_log_prob": torch.zeros(5, 4)}
        vocab_parallel_loss(logits, target, None, "psft", token_stats=turned)


def test_an_objective_may_be_given_by_its_name():
    logits, target = torch.randn(6, VOCAB).double(), torch.arange(6)
    log_prob = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    loss, weight = vocab_parallel_loss(logits, target, None, "dft")
    torch.testing.assert_close(weight, log_prob.exp())
    torch.testing.assert_close(loss, -log_prob.exp() * log_prob)
    with pytest.raises(ValueError, match="--loss: expected one of sft, dft"):
        vocab_parallel_loss(logits, target, None, "DFT")


def test_padded_vocabulary_takes_no_probability_and_no_gradient():
    case = make_case(2, torch.float32)
    padded = torch.cat([case["logits"], torch.full((TOKENS, 8), 30.0)], dim=1).requires_grad_()
    loss, _ = vocab_parallel_dft_loss(padded, case["target"], vocab_size=VOCAB)
    expected, _ = vocab_parallel_dft_loss(case["logits"], case["target"])
    loss.sum().backward()
    assert torch.equal(loss.detach(), expected)
    assert (padded.grad[:, VOCAB:] == 0).all() and padded.grad[:, :VOCAB].any()


def test_ignored_tokens_may_hold_anything():
    case = make_case(4, torch.float32)
    ignored = case["target"] == -100
    case["logits"][ignored] = torch.nan
    logits = case["logits"].requires_grad_()
    loss, weight = vocab_parallel_dft_loss(logits, case["target"])
    loss.sum().backward()
    assert loss.isfinite().all() and weight.isfinite().all() and logits.grad.isfinite().all()
    assert (loss[ignored] == 0).all() and (logits.grad[ignored] == 0).all()


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_supervised_token_is_a_zero_loss_in_the_graph(overwrite):
    for tokens in (0, 3):
        logits = torch.randn(tokens, 8, requires_grad=True)
        loss, _ = vocab_parallel_dft_loss(
            logits * 1, torch.full((tokens,), -100), overwrite_logits=overwrite
        )
        loss.sum().backward()
        assert loss.sum() == 0 and logits.grad.shape == (tokens, 8) and not logits.grad.any()


def test_a_target_that_no_shard_holds_is_nan_not_a_number():
    loss, _ = vocab_parallel_dft_loss(torch.randn(2, 8), torch.tensor([3, 8]))
    assert loss[0].isfinite() and loss[1].isnan()


def test_excluded_target_has_no_weight_and_no_gradient():
    logits = torch.randn(1, 8)
    logits[0, 2] = -torch.inf
    logits.requires_grad_()
    loss, weight = vocab_parallel_dft_loss(logits, torch.tensor([2]))
    loss.sum().backward()
    assert loss.item() == 0 and weight.item() == 0 and not logits.grad.any()


def test_second_backward_over_overwritten_logits_is_refused():
    logits = torch.randn(2, 8, requires_grad=True)
    loss, _ = vocab_parallel_dft_loss(logits * 1, torch.tensor([1, 2]), overwrite_logits=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="target: expected the shape"):
        vocab_parallel_statistics(torch.randn(2, 3, 8), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference_logits: expected"):
        vocab_parallel_statistics(
            torch.randn(2, 8), torch.tensor([0, 1]), reference_logits=torch.randn(2, 9)
        )


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 5),
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    chunk_bytes=st.integers(1, 400),
    seed=st.integers(0, 10**6),
)
def test_any_shape_scale_and_chunk_gives_the_gradient_of_minus_p(
    tokens, vocab, scale, chunk_bytes, seed
):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(tokens, vocab, generator=g, dtype=torch.float64)).requires_grad_()
    target = torch.randint(vocab, (tokens,), generator=g)
    loss, weight = vocab_parallel_dft_loss(logits, target, chunk_bytes=chunk_bytes)
    loss.sum().backward()
    exact = logits.detach().clone().requires_grad_()
    p = exact.softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    (-p).sum().backward()
    torch.testing.assert_close(weight, p.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits.grad, exact.grad, rtol=1e-9, atol=1e-12)


def test_doctests():
    for module in (vocab_parallel, registry):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
