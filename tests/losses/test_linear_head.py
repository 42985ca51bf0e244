"""linear_head against dense float64 references: values, d_hidden and dW at TP 1, 2 and 4."""

import doctest

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dft.losses import linear_forward, linear_head, registry
from megatron_dft.losses.linear_head import linear_head_loss
from tests.losses import collectives
from tests.losses.reference import PARAMETERS, dense_loss, relative_error, rewards
from tests.ranks import run_ranks

SEQUENCE, BATCH, HIDDEN, VOCAB, PADDED = 12, 2, 16, 50, 64
OBJECTIVES = list(PARAMETERS)


def make_case(seed: int, dtype: torch.dtype) -> dict:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(BATCH, SEQUENCE, generator=g) < 0.6
    mask[:, : SEQUENCE // 4] = False  # the first rank's part of the sequence is not supervised
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=g)
    weight = torch.randn(PADDED, HIDDEN, generator=g)
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=g)
    # Targets that the model likes: a row of weight per label is added to the hidden state.
    hidden += 0.2 * torch.rand(SEQUENCE, BATCH, 1, generator=g) * weight[labels.t()]
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype) / 2,
        "labels": labels,
        "mask": mask,
        "segments": torch.arange(2 * BATCH).repeat_interleave(SEQUENCE // 2).view(BATCH, SEQUENCE),
        "upstream": torch.randn(BATCH, SEQUENCE, generator=g),
        "reference": torch.randn(BATCH * SEQUENCE, VOCAB, generator=g).double(),
    }


def exact(name: str, case: dict, upstream, rounded: bool = True) -> tuple:
    """(loss [b, s], d_hidden, dW, top-1 [b, s]) in float64; `rounded`: of bf16 logits."""
    dtype = case["hidden"].dtype
    hidden = case["hidden"].double().clone().requires_grad_()
    weight = case["weight"].double().clone().requires_grad_()
    logits = hidden @ weight[:VOCAB].t()
    if rounded:
        logits = logits + (logits.to(dtype) - logits).detach()
    logits = logits.transpose(0, 1).reshape(-1, VOCAB)
    flat = {k: case[k].reshape(-1) for k in ("labels", "mask", "segments")}
    loss, _ = dense_loss(
        name, logits, flat["labels"], flat["mask"], flat["segments"], case["reference"]
    )
    loss.backward(upstream.reshape(-1).double())
    top1 = flat["mask"] & (logits.argmax(1) == flat["labels"])
    shape = (BATCH, SEQUENCE)
    return loss.detach().view(shape), hidden.grad, weight.grad, top1.view(shape)


def ours(name: str, case: dict, upstream, group, sequence_parallel, **options) -> tuple:
    """(loss, weight, log p, top-1, d_hidden, dW) of this rank."""
    log_ref = case["reference"].log_softmax(-1).gather(1, case["labels"].reshape(-1, 1))
    stats = {
        "segment_ids": case["segments"],
        "reference_log_prob": log_ref.view(BATCH, SEQUENCE),
        "reward": rewards(case["segments"]),
    }
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    weight = case["weight"].chunk(size)[rank].clone().requires_grad_()
    hidden = case["hidden"].chunk(size)[rank] if sequence_parallel else case["hidden"]
    hidden = hidden.clone().requires_grad_()
    objective = registry.get(name.split("/")[0], **PARAMETERS[name])
    if "kl" in objective.needs:
        logits = torch.nn.functional.pad(case["reference"], (0, PADDED - VOCAB)).chunk(size, 1)
        logits = logits[rank].view(BATCH, SEQUENCE, -1).transpose(0, 1)
        options["reference_logits"] = logits.to(hidden.dtype)
    out = linear_head_loss(
        hidden,
        weight,
        case["labels"],
        objective=objective,
        mask=case["mask"].float(),
        group=group,
        sequence_parallel=sequence_parallel,
        vocab_size=VOCAB,
        stats=stats,
        **options,
    )
    out.loss.backward(upstream)
    return *(x.detach() for x in out[:4]), hidden.grad, weight.grad


def _upstream(case: dict, uniform: bool):
    """One shared upstream gradient is what a mean sends back."""
    return torch.full_like(case["upstream"], 0.37) if uniform else case["upstream"]


def _all(runs: list) -> list:
    results = []
    for name, seed, dtype, sequence_parallel in runs:
        case = make_case(seed, dtype)
        upstream = _upstream(case, seed % 3 == 0)
        results.append(ours(name, case, upstream, dist.group.WORLD, sequence_parallel))
    return results


def norm_error(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_objective_equals_the_dense_float64_one(world_size):
    runs = [
        (name, seed, dtype, sequence_parallel)
        for seed, name in enumerate(OBJECTIVES)
        for dtype in (torch.float32, torch.bfloat16)
        for sequence_parallel in sorted({False, world_size > 1})
    ]
    ranks = run_ranks(_all, world_size, runs)
    for i, (name, seed, dtype, sequence_parallel) in enumerate(runs):
        case = make_case(seed, dtype)
        loss, d_hidden, d_weight, top1 = exact(name, case, _upstream(case, seed % 3 == 0))
        assert torch.equal(ranks[0][i][3], top1)
        parts = [rank[i][4] for rank in ranks]
        got_hidden = torch.cat(parts) if sequence_parallel else parts[0]
        got_weight = torch.cat([rank[i][5] for rank in ranks])
        where = (name, dtype, sequence_parallel)
        if dtype == torch.float32:
            assert relative_error(ranks[0][i][0].flatten(), loss.flatten()) <= 1e-5, where
            assert relative_error(got_hidden, d_hidden) <= 1e-5, where
            assert relative_error(got_weight[:VOCAB], d_weight[:VOCAB]) <= 1e-5, where
        else:
            assert norm_error(ranks[0][i][0], loss) <= 1e-2, where
            assert norm_error(got_hidden, d_hidden) <= 1e-2, where
            assert norm_error(got_weight, d_weight) <= 1e-2, where
        assert not got_weight[VOCAB:].any(), "a padded row got a gradient"
        assert not got_hidden[~case["mask"].t()].any()
        for rank in ranks:
            for j in range(4):
                assert torch.equal(rank[i][j], ranks[0][i][j]), "ranks disagree"
            if not sequence_parallel:
                assert torch.equal(rank[i][4], got_hidden), "d_hidden was not reduced"


@pytest.mark.parametrize("design", ["recompute", "forward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 7, 10_000])
def test_both_designs_agree_for_any_chunk_and_any_upstream_gradient(design, dtype, chunk_size):
    for seed, name in enumerate(("dft", "p-alpha", "psft", "eaft", "deft")):
        for uniform in (True, False):
            case = make_case(seed, dtype)
            upstream = _upstream(case, uniform)
            loss, d_hidden, d_weight, _ = exact(name, case, upstream)
            got = ours(name, case, upstream, None, False, design=design, chunk_size=chunk_size)
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
            assert norm_error(got[0], loss) <= tolerance, name
            assert norm_error(got[4], d_hidden) <= tolerance, name
            assert norm_error(got[5], d_weight) <= tolerance, name


def test_a_summed_loss_uses_the_gradient_of_the_forward_once(monkeypatch):
    case = make_case(0, torch.float32)
    calls = []
    recompute = linear_forward.linear_gradients
    monkeypatch.setattr(
        linear_forward, "linear_gradients", lambda *a: calls.append(1) or recompute(*a)
    )
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    out = linear_head_loss(
        hidden, weight, case["labels"], objective=registry.get("dft"), mask=case["mask"]
    )
    first = torch.autograd.grad(out.loss.sum() / 3, (hidden, weight), retain_graph=True)
    assert not calls
    second = torch.autograd.grad(out.loss.sum() / 3, (hidden, weight))
    assert calls, "the gradients of the forward were handed out already"
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def _counted(case, sequence_parallel, supervised):
    calls = collectives.count(
        "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather"
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = case["hidden"].chunk(size)[rank] if sequence_parallel else case["hidden"]
    hidden = hidden.clone().requires_grad_()
    out = linear_head_loss(
        hidden,
        case["weight"].chunk(size)[rank],
        case["labels"],
        objective=registry.get("dft"),
        mask=case["mask"] & supervised,
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        chunk_size=3,
    )
    forward = dict(calls)
    calls.clear()
    out.loss.sum().backward()
    return forward, dict(calls), out.loss.detach(), hidden.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_statistics_collective_whatever_the_number_of_chunks(sequence_parallel):
    case = make_case(0, torch.float32)
    for forward, backward, _, _ in run_ranks(_counted, 2, case, sequence_parallel, True):
        if sequence_parallel:  # the hidden states are gathered as well
            assert forward == {"all_gather_into_tensor": 2}
            assert backward == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
        else:
            assert forward == {"all_gather_into_tensor": 1}
            assert backward == {"all_reduce": 1}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_micro_batch_without_supervised_tokens_is_a_zero_loss_in_the_graph(sequence_parallel):
    case = make_case(0, torch.float32)
    for _, _, loss, d_hidden in run_ranks(_counted, 2, case, sequence_parallel, False):
        assert not loss.any() and not d_hidden.any()


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("design", ["recompute", "forward"])
def test_the_logits_never_exist(design):
    tokens, vocab, hidden_size, chunk_size = 256, 1024, 8, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    with _LargestTensor() as largest:
        out = linear_head_loss(
            hidden,
            weight,
            torch.randint(vocab, (tokens,)),
            objective=registry.get("dft"),
            chunk_size=chunk_size,
            design=design,
        )
        out.loss.sum().backward()
    assert largest.elements <= chunk_size * vocab


def test_a_frozen_output_layer_costs_no_gradient_and_hidden_still_gets_its_own():
    case = make_case(1, torch.float32)
    for design in ("recompute", "forward"):
        hidden = case["hidden"].clone().requires_grad_()
        out = linear_head_loss(
            hidden,
            case["weight"],
            case["labels"],
            objective=registry.get("sft"),
            mask=case["mask"],
            design=design,
        )
        out.loss.sum().backward()
        assert hidden.grad.any() and case["weight"].grad is None


def test_without_gradients_the_same_loss_comes_out():
    case = make_case(1, torch.float32)
    arguments = (case["hidden"].requires_grad_(), case["weight"], case["labels"])
    options = {"objective": registry.get("dft"), "mask": case["mask"]}
    with torch.no_grad():
        evaluated = linear_head_loss(*arguments, **options)
    torch.testing.assert_close(evaluated.loss, linear_head_loss(*arguments, **options).loss)


def test_doctest():
    result = doctest.testmod(linear_head)
    assert result.attempted and not result.failed
