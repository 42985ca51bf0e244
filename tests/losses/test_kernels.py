"""The kernels from logits, under Triton's interpreter, against dense float64 references."""

import collections

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses import kernels, registry
from megatron_dft.losses.vocab_parallel import (
    vocab_parallel_dft_loss,
    vocab_parallel_loss,
    vocab_parallel_statistics,
    vocab_shard_start,
)
from tests.losses.interpreted import run_kernels
from tests.losses.reference import (
    HAS_KL,
    KINDS,
    PARAMETERS,
    data_stats,
    dense_loss,
    entropy_of_top,
    relative_error,
)
from tests.ranks import run_ranks

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS, VOCAB = 7, 75  # odd: no row but the first begins at a multiple of 16 bytes
BORDERS = {1: [0, 75], 2: [0, 33, 75], 4: [0, 5, 5, 40, 75]}  # uneven, and one shard of no token


def make_case(seed: int, dtype: torch.dtype) -> dict:
    """Logits of a model that is sure of some tokens and knows nothing of others."""
    g = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(TOKENS, VOCAB, generator=g)
    target = torch.randint(VOCAB, (TOKENS,), generator=g)
    logits[torch.arange(TOKENS), target] += 4 * torch.rand(TOKENS, generator=g)
    reference = logits + 0.5 * torch.randn(TOKENS, VOCAB, generator=g)
    logits[1, ::3] = -torch.inf
    logits[1, target[1]] = 1.0
    reference[1, ::3] = -torch.inf
    target[3] = -100
    return {
        "logits": logits.to(dtype),
        "reference": reference.to(dtype),
        "target": target,
        "segments": torch.arange(TOKENS) // 3,
        # Scaled as a loss in fp16 is, so that small gradients stay above fp16's least number.
        "upstream": torch.randn(TOKENS, generator=g) * (512 if dtype == torch.float16 else 1),
    }


def dense(name: str, case: dict) -> tuple:
    """(loss, gradient) in float64."""
    # e^{-1e5} is 0 as e^{-inf} is, and 0 · (−1e5) is 0 where autograd would find NaN.
    logits = case["logits"].double().clamp(min=-1e5).requires_grad_()
    reference = case["reference"].double().clamp(min=-1e5)
    loss, _ = dense_loss(
        name, logits, case["target"], case["target"] != -100, case["segments"], reference
    )
    loss.backward(case["upstream"].double())
    return loss.detach(), logits.grad


def gradient_error(got, exact, name: str) -> float:
    """`relative_error`, but for half a step of the dtype's least numbers, which none can beat."""
    number = torch.finfo(got.dtype)
    half_step = number.smallest_normal * number.eps / 2
    error = got.double() - exact
    error = error.sign() * (error.abs() - half_step).clamp(min=0.0)
    if name in HAS_KL:  # where p ≈ q, p − q is a small difference: measured over the tensor
        return relative_error((exact + error).flatten(), exact.flatten())
    return relative_error(exact + error, exact)


def _shard(x):
    """This rank's columns, as a view whose rows have padding behind them."""
    borders = BORDERS[dist.get_world_size()]
    own = x[..., borders[dist.get_rank()] : borders[dist.get_rank() + 1]]
    return torch.nn.functional.pad(own, (0, 5), value=40.0)[..., : own.shape[-1]]


def _objectives(runs: list) -> list:
    results = []
    group = dist.group.WORLD
    for name, seed, dtype in runs:
        case = make_case(seed, dtype)
        log_ref = case["reference"].double().log_softmax(-1)
        log_ref = log_ref.gather(1, case["target"].clamp(min=0).unsqueeze(1)).squeeze(1)
        objective = registry.get(name.split("/")[0], **PARAMETERS[name])
        options = {}
        if "kl" in objective.needs:
            options["reference_logits"] = _shard(case["reference"])
        logits = _shard(case["logits"]).detach().requires_grad_()
        assert kernels.serve(logits)
        loss, weight = vocab_parallel_loss(
            logits * 1.0 if seed % 2 else logits,
            case["target"],
            group,
            objective,
            token_stats=data_stats(case["segments"], log_ref.float()),
            overwrite_logits=seed % 2 == 1,
            vocab_start=BORDERS[dist.get_world_size()][dist.get_rank()],
            **options,
        )
        loss.backward(case["upstream"])
        results.append((loss.detach(), weight, logits.grad))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_objective_equals_the_dense_float64_one(world_size):
    dtypes = list(TOLERANCE)
    runs = [
        (name, seed, dtypes[(seed + turn + world_size) % 3])
        for seed, name in enumerate(KINDS)
        for turn in range(2 if world_size == 1 else 1)
    ]
    ranks = run_kernels(_objectives, world_size, runs)
    for i, (name, seed, dtype) in enumerate(runs):
        case = make_case(seed, dtype)
        loss, gradient = dense(name, case)
        got = torch.cat([rank[i][2] for rank in ranks], dim=1)
        assert got.dtype == dtype
        assert gradient_error(got, gradient, name) <= TOLERANCE[dtype], (name, dtype)
        for rank in ranks:
            assert relative_error(rank[i][0], loss) <= 1e-5, (name, dtype)
            assert torch.equal(rank[i][1], ranks[0][i][1]), (name, "weight differs between ranks")
        assert (got[case["target"] == -100] == 0).all(), name


NAMES = ("log_prob", "entropy", "entropy_top20", "sum_sq_prob", "kl")


def _statistics(dtype) -> tuple:
    case = make_case(5, dtype)
    logits = _shard(case["logits"]).detach().requires_grad_()
    calls: collections.Counter = collections.Counter()
    original = dist.all_gather_into_tensor
    start = vocab_shard_start(logits.shape[1], dist.group.WORLD)

    def counted(*args, **kwargs):
        calls["all_gather_into_tensor"] += 1
        return original(*args, **kwargs)

    dist.all_gather_into_tensor = counted
    found = vocab_parallel_statistics(
        logits,
        case["target"],
        dist.group.WORLD,
        entropy=True,
        entropy_top20=True,
        sum_sq_prob=True,
        reference_logits=_shard(case["reference"]),
        vocab_start=start,
    )
    values = [getattr(found, name) for name in NAMES]
    each = [torch.autograd.grad(v, logits, case["upstream"], retain_graph=True)[0] for v in values]
    (total,) = torch.autograd.grad(values, logits, [case["upstream"]] * len(values))
    return [v.detach() for v in values], each, total, dict(calls), found.is_top1


@pytest.mark.parametrize("programs", [1, 64], ids=["one part a row", "rows in parts"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_statistics_and_their_gradients_on_uneven_shards_with_one_collective(world_size, programs):
    dtype = torch.float32
    case = make_case(5, dtype)
    logits = case["logits"].double().clamp(min=-1e5).requires_grad_()
    supervised = case["target"] != -100
    log_p = logits.log_softmax(-1)
    log_q = case["reference"].double().clamp(min=-1e5).log_softmax(-1)
    p, target = log_p.exp(), case["target"].clamp(min=0).unsqueeze(1)
    exact = {
        "log_prob": log_p.gather(1, target).squeeze(1),
        "entropy": -(p * log_p).sum(-1),
        "entropy_top20": entropy_of_top(log_p),
        "sum_sq_prob": p.square().sum(-1),
        "kl": (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    upstream = torch.where(supervised, case["upstream"].double(), 0.0)
    ranks = run_kernels(_statistics, world_size, dtype, programs=programs)
    total = torch.zeros_like(logits)
    for i, name in enumerate(NAMES):
        (gradient,) = torch.autograd.grad(exact[name], logits, upstream, retain_graph=True)
        total += gradient
        got = torch.cat([rank[1][i] for rank in ranks], dim=1)
        assert relative_error(got, gradient) <= 1e-5, name
        for rank in ranks:
            assert relative_error(rank[0][i][supervised], exact[name][supervised]) <= 1e-5, name
            assert not rank[0][i][~supervised].any(), name
    assert relative_error(torch.cat([rank[2] for rank in ranks], dim=1), total) <= 1e-5
    for rank in ranks:
        assert rank[3] == ({"all_gather_into_tensor": 1} if world_size > 1 else {})
        first = case["logits"].argmax(-1) == case["target"]
        assert torch.equal(rank[4], first)


def _ties() -> tuple:
    logits = torch.zeros(5, VOCAB)
    logits[0, [3, 60]] = logits[1, [3, 60]] = logits[2, [20, 22]] = logits[3, [20, 22]] = 7.0
    logits[4] = -torch.inf
    logits[4, 50:] = 2.0
    target = torch.tensor([3, 60, 20, 22, 50])
    start = BORDERS[dist.get_world_size()][dist.get_rank()]
    found = vocab_parallel_statistics(_shard(logits), target, dist.group.WORLD, vocab_start=start)
    return found.is_top1.tolist(), found.log_prob


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ties_go_to_the_first_token_as_in_greedy_decoding(world_size):
    for run in (run_kernels, run_ranks):
        for is_top1, log_prob in run(_ties, world_size):
            assert is_top1 == [True, False, True, False, True]
            assert log_prob[0] == log_prob[1]


def _shapes() -> None:
    """Layouts, padding, no token, a target that no shard holds, overwritten logits."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(3, 4, VOCAB, generator=generator)
    target = torch.randint(VOCAB, (3, 4), generator=generator)
    plain = base.double().requires_grad_()
    log_p = plain.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    (-log_p.exp()).sum().backward()
    for view, order in (
        (base, (0, 1)),
        (base.transpose(0, 1).contiguous().transpose(0, 1), (0, 1)),
        (base.transpose(0, 1), (1, 0)),
        (base.transpose(1, 2).contiguous().transpose(1, 2), (0, 1)),
    ):
        logits = view.detach().requires_grad_()
        loss, weight = vocab_parallel_dft_loss(logits, target.permute(order))
        loss.sum().backward()
        torch.testing.assert_close(weight.permute(order).double(), log_p.exp(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            logits.grad.permute(*order, 2).double(), plain.grad, rtol=1e-5, atol=1e-7
        )
    for overwrite in (False, True):
        padded = torch.nn.functional.pad(base, (0, 9), value=30.0).requires_grad_()
        loss, _ = vocab_parallel_dft_loss(
            padded * 1.0, target, vocab_size=VOCAB, overwrite_logits=overwrite
        )
        loss.sum().backward()
        assert not padded.grad[..., VOCAB:].any()
        torch.testing.assert_close(
            padded.grad[..., :VOCAB].double(), plain.grad, rtol=1e-5, atol=1e-7
        )
        for tokens in (0, 2):
            logits = torch.randn(tokens, 8, requires_grad=True)
            loss, _ = vocab_parallel_dft_loss(
                logits * 1.0, torch.full((tokens,), -100), overwrite_logits=overwrite
            )
            loss.sum().backward()
            assert loss.sum() == 0 and logits.grad.shape == (tokens, 8) and not logits.grad.any()
    loss, _ = vocab_parallel_dft_loss(torch.randn(2, 8), torch.tensor([3, 8]))
    assert loss[0].isfinite() and loss[1].isnan()
    nothing = torch.full((1, 8), torch.nan)
    assert vocab_parallel_dft_loss(nothing, torch.tensor([-100]))[0].item() == 0
    assert vocab_parallel_dft_loss(nothing, torch.tensor([3]))[0].isnan()
    logits = torch.randn(2, 8, requires_grad=True)
    loss, _ = vocab_parallel_dft_loss(logits * 1, torch.tensor([1, 2]), overwrite_logits=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    assert not kernels.serve(torch.zeros(2, 8, dtype=torch.float64))


def test_layouts_padding_and_what_has_no_number():
    run_kernels(_shapes, 1)


def test_without_a_gpu_or_the_interpreter_torch_serves():
    assert not kernels.serve(torch.zeros(2, 8))
