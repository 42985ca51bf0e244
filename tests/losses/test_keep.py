"""The linear head's `keep` design, under Triton's interpreter, against dense float64 references."""

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from tests.losses.interpreted import run_kernels
from tests.losses.reference import KINDS, relative_error
from tests.losses.test_linear_head import (
    BATCH,
    PADDED,
    SEQUENCE,
    VOCAB,
    exact,
    make_case,
    norm_error,
    ours,
)

SUPERVISED = 10  # tokens of make_case(0); one column of all of them is 40 bytes in fp32
MEMORY = {"all kept": 1 << 20, "some kept": (24 + 16) * 4 * SUPERVISED}


def _objectives(runs: list) -> list:
    group = dist.group.WORLD
    return [
        ours(name, case, case["upstream"], group, parallel, design="auto", loss_memory=memory)
        for name, case, parallel, memory in runs
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_objective_equals_the_dense_float64_one(world_size):
    runs = [
        (
            name,
            make_case(seed, torch.bfloat16 if seed % 3 == 2 else torch.float32),
            world_size > 1 and seed % 2 == 1,
            list(MEMORY.values())[seed // 2 % 2],
        )
        for seed, name in enumerate(KINDS)
    ]
    ranks = run_kernels(_objectives, world_size, runs)
    for i, (name, case, sequence_parallel, _) in enumerate(runs):
        # Logits of bf16 are rounded in the kernels, the reference's are not.
        loss, d_hidden, d_weight, top1 = exact(name, case, case["upstream"], rounded=False)
        parts = [rank[i][4] for rank in ranks]
        got_hidden = torch.cat(parts) if sequence_parallel else parts[0]
        got_weight = torch.cat([rank[i][5] for rank in ranks])
        where = (name, case["hidden"].dtype, sequence_parallel)
        if case["hidden"].dtype == torch.float32:
            assert torch.equal(ranks[0][i][3], top1)
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


def _exact_target() -> tuple:
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(40, 64, generator=g).bfloat16()
    weight = (torch.randn(96, 64, generator=g) / 4).bfloat16()
    labels = torch.randint(96, (40,), generator=g)
    hidden = (hidden + 2.5 * weight[labels]).detach().requires_grad_()
    weight.requires_grad_()
    out = linear_head_loss(hidden, weight, labels, objective=registry.get("dft"))
    out.loss.sum().backward()
    return hidden.detach(), weight.detach(), labels, out.log_prob, hidden.grad, weight.grad


def test_the_targets_logit_is_an_fp32_product_in_value_and_gradient():
    hidden, weight, labels, log_prob, d_hidden, d_weight = run_kernels(_exact_target, 1)[0]
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    unrounded = h @ w.t()
    # The logits that the kernels have: rounded, but for the target's.
    seen = unrounded + (unrounded.float().bfloat16() - unrounded).detach()
    target = labels.unsqueeze(1)
    seen = seen.scatter(1, target, unrounded.gather(1, target))
    log_p = seen.log_softmax(1).gather(1, target).squeeze(1)
    (-log_p.exp()).sum().backward()
    torch.testing.assert_close(log_prob.double(), log_p.detach(), rtol=1e-5, atol=1e-5)
    assert norm_error(d_hidden, h.grad) <= 5e-3 and norm_error(d_weight, w.grad) <= 5e-3
    p = unrounded.detach().log_softmax(1).gather(1, target).squeeze(1).exp()
    rounded = unrounded.detach().float().bfloat16().double()
    before = rounded.log_softmax(1).gather(1, target).squeeze(1).exp()
    assert unrounded.max() > 16
    assert (log_prob.exp() - p).abs().mean() < 0.5 * (before - p).abs().mean()


def _blocks(memory) -> tuple:
    case = make_case(0, torch.float32)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    products = []
    original = torch.mm

    def counted(*args, **kwargs):
        products.append(tuple(args[1].shape))
        return original(*args, **kwargs)

    torch.mm = counted
    out = linear_head_loss(
        hidden, weight, case["labels"], objective=registry.get("dft"), mask=case["mask"],
        vocab_size=VOCAB, loss_memory=memory,
    )  # fmt: skip
    forward = [shape[1] for shape in products]
    products.clear()
    first = torch.autograd.grad(out.loss.sum(), (hidden, weight), retain_graph=True)
    again = [shape[1] for shape in products if shape[0] == hidden.shape[-1]]
    second = torch.autograd.grad(out.loss.sum(), (hidden, weight))
    return int(case["mask"].sum()), forward, again, first, second


def test_what_does_not_fit_in_memory_is_computed_again():
    tokens, forward, again, first, second = run_kernels(_blocks, 1, MEMORY["all kept"])[0]
    assert tokens == SUPERVISED
    assert forward == [56] and not again  # 50 real rows and those that fill the last eight
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "a second backward finds the logits gone and computes them"
    _, forward, again, cut, _ = run_kernels(_blocks, 1, MEMORY["some kept"])[0]
    assert sum(forward) == 56 and max(forward) == 24 and forward[-1] == 24
    assert sum(again) == 32
    for a, b in zip(first, cut, strict=True):
        torch.testing.assert_close(a, b)


def _order(sequence_parallel) -> list:
    from megatron_dft.losses.kernels import keep

    case = make_case(0, torch.float32)
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = case["hidden"].chunk(size)[rank] if sequence_parallel else case["hidden"]
    hidden = hidden.clone().requires_grad_()
    weight = case["weight"].chunk(size)[rank].clone().requires_grad_()
    events = []

    def noted(name, original):
        def call(*args, **kwargs):
            events.append(name(args, kwargs))
            return original(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        label = lambda a, k, name=name: name + (" async" if k.get("async_op") else "")  # noqa: E731
        setattr(dist, name, noted(lambda a, k, label=label: label(a, k), getattr(dist, name)))
    keep.put_product = noted(
        lambda a, k: "dW" if len(a[0]) == len(weight) else "d_hidden", keep.put_product
    )
    out = linear_head_loss(
        hidden, weight, case["labels"], objective=registry.get("dft"), mask=case["mask"],
        group=dist.group.WORLD, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    forward, events[:] = list(events), []
    out.loss.sum().backward()
    return [forward, events]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_statistics_collective_and_the_reduction_runs_beside_dw(sequence_parallel):
    for forward, backward in run_kernels(_order, 2, sequence_parallel):
        if sequence_parallel:
            assert forward == ["all_gather_into_tensor async", "all_gather_into_tensor"]
            assert backward == [
                "all_gather_into_tensor async", "d_hidden", "reduce_scatter_tensor async", "dW",
            ]  # fmt: skip
        else:
            assert forward == ["all_gather_into_tensor"]
            assert backward == ["d_hidden", "all_reduce async", "dW"]


def _kl(sequence_parallel, memory) -> tuple:
    """DFT with a KL term on top, by reference logits and by reference hidden states."""
    case = make_case(3, torch.float32)
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(8)
    other = case["hidden"] + 0.3 * torch.randn(case["hidden"].shape, generator=g)
    table = case["weight"] + 0.1 * torch.randn(case["weight"].shape, generator=g)
    mine = table.chunk(size)[rank]
    part = (lambda x: x.chunk(size)[rank]) if sequence_parallel else (lambda x: x)
    results = []
    for reference in (
        {"reference_hidden": part(other), "reference_weight": mine},
        {"reference_logits": other @ mine.t()},
    ):
        hidden = part(case["hidden"]).clone().requires_grad_()
        weight = case["weight"].chunk(size)[rank].clone().requires_grad_()
        out = linear_head_loss(
            hidden, weight, case["labels"], objective=registry.get("dft"), mask=case["mask"],
            group=dist.group.WORLD, sequence_parallel=sequence_parallel, vocab_size=VOCAB,
            loss_memory=memory, **reference,
        )  # fmt: skip
        ((out.loss + 0.4 * out.kl) * case["upstream"]).sum().backward()
        results.append((out.kl.detach(), hidden.grad, weight.grad))
    return other, table, results


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_kl_term_by_reference_logits_or_hidden_states(sequence_parallel):
    for memory in (1 << 20, 3000):
        ranks = run_kernels(_kl, 2, sequence_parallel, memory)
        other, table, _ = ranks[0]
        case = make_case(3, torch.float32)
        hidden = case["hidden"].double().requires_grad_()
        weight = case["weight"].double().requires_grad_()
        log_p = (hidden @ weight[:VOCAB].t()).log_softmax(-1).transpose(0, 1)
        log_q = (other.double() @ table[:VOCAB].double().t()).log_softmax(-1).transpose(0, 1)
        kl = torch.where(case["mask"], (log_q.exp() * (log_q - log_p)).sum(-1), 0.0)
        chosen = log_p.gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1)
        dft = torch.where(case["mask"], -chosen.detach().exp() * chosen, 0.0)
        ((dft + 0.4 * kl) * case["upstream"]).sum().backward()
        for i in range(2):
            parts = [rank[2][i][1] for rank in ranks]
            d_hidden = torch.cat(parts) if sequence_parallel else parts[0]
            d_weight = torch.cat([rank[2][i][2] for rank in ranks])
            assert relative_error(ranks[0][2][i][0].flatten(), kl.detach().flatten()) <= 1e-5
            assert relative_error(d_hidden, hidden.grad) <= 1e-5
            assert relative_error(d_weight[:VOCAB], weight.grad[:VOCAB]) <= 1e-5
            assert not d_weight[VOCAB:].any()


def _nothing() -> None:
    case = make_case(0, torch.bfloat16)
    hidden = case["hidden"].requires_grad_()
    weight = case["weight"].requires_grad_()
    for mask in (torch.zeros(BATCH, SEQUENCE), torch.ones(BATCH, SEQUENCE)):
        out = linear_head_loss(
            hidden, weight, case["labels"], objective=registry.get("dft"), mask=mask,
            group=dist.group.WORLD if dist.get_world_size() > 1 else None, vocab_start=0,
            vocab_size=VOCAB,
        )  # fmt: skip
        d_hidden, d_weight = torch.autograd.grad(out.loss.sum(), (hidden, weight))
        for x in (d_hidden, d_weight, out.loss):
            assert bool(x.any()) == bool(mask[0, 0])
    with torch.no_grad():
        assert torch.equal(
            linear_head_loss(
                hidden, weight, case["labels"], objective=registry.get("dft"), vocab_size=VOCAB
            ).loss,
            out.loss,
        )
    frozen = linear_head_loss(
        hidden, weight.detach(), case["labels"], objective=registry.get("sft"), vocab_size=VOCAB
    )
    assert torch.autograd.grad(frozen.loss.sum(), hidden)[0].any()
    assert PADDED > VOCAB


def test_no_supervised_token_no_gradient_and_a_frozen_layer():
    run_kernels(_nothing, 1)
