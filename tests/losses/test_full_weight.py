"""Tokens of full weight: −log p and its gradient there, every other token as without."""

import pytest
import torch
import torch.distributed as dist

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.report import END_PROB, StepFigures, loss_report, token_figures
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_parallel import vocab_parallel_loss
from tests.losses.reference import HAS_KL, PARAMETERS, dense_loss, relative_error, rewards
from tests.ranks import run_ranks

ROWS, SEQUENCE, HIDDEN, VOCAB = 2, 12, 16, 32
SHAPE = (ROWS, SEQUENCE)


def make_case() -> dict:
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(SHAPE, generator=g) < 0.7
    return {
        "hidden": torch.randn(SEQUENCE, ROWS, HIDDEN, generator=g).double(),
        "weight": torch.randn(VOCAB, HIDDEN, generator=g).double() / 2,
        "labels": torch.randint(VOCAB, SHAPE, generator=g),
        "mask": mask,
        # Some lie where nothing is supervised, which must not matter.
        "full": (torch.rand(SHAPE, generator=g) < 0.4).to(torch.uint8),
        "segments": torch.arange(2 * ROWS).repeat_interleave(SEQUENCE // 2).view(SHAPE),
        "upstream": torch.randn(SHAPE, generator=g).double(),
        "reference": torch.randn(ROWS * SEQUENCE, VOCAB, generator=g).double(),
    }


def exact(name: str, case: dict) -> tuple:
    """(loss, d_hidden, dW) by the formulas: −log p at the full tokens, asft's KL everywhere."""
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1).reshape(-1, VOCAB)
    flat = {k: case[k].reshape(-1) for k in ("labels", "mask", "segments", "full")}
    loss, log_p = dense_loss(
        name, logits, flat["labels"], flat["mask"], flat["segments"], case["reference"]
    )
    full = -log_p
    if name.startswith("asft"):
        log_probs, log_ref = logits.log_softmax(-1), case["reference"].log_softmax(-1)
        kl = (log_ref.exp() * (log_ref - log_probs)).sum(-1)
        full = full + PARAMETERS[name]["kl_weight"] * kl
    loss = torch.where(flat["mask"] & flat["full"].bool(), full, loss)
    loss.backward(case["upstream"].reshape(-1))
    return loss.detach().view(SHAPE), hidden.grad, weight.grad


def stats_of(case: dict, full: bool = True) -> dict:
    log_ref = case["reference"].log_softmax(-1).gather(1, case["labels"].reshape(-1, 1))
    stats = {
        "segment_ids": case["segments"],
        "reference_log_prob": log_ref.view(SHAPE),
        "reward": rewards(case["segments"]),
    }
    return stats | ({"full_weight": case["full"]} if full else {})


def objective_of(name: str):
    return registry.get(name.split("/")[0], **PARAMETERS[name])


def judge(name, found, expected):
    for got, want, what in zip(found, expected, ("loss", "d_hidden", "dW"), strict=True):
        assert relative_error(got.reshape(-1), want.reshape(-1)) <= 1e-9, (name, what)


@pytest.mark.parametrize("name", PARAMETERS)
def test_from_logits(name):
    case = make_case()
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1)
    target = torch.where(case["mask"], case["labels"], -100)
    options = {"reference_logits": case["reference"].view(*SHAPE, VOCAB)}
    stats = stats_of(case)
    found = vocab_parallel_loss(
        logits,
        target,
        None,
        objective_of(name),
        token_stats=stats,
        **(options if name in HAS_KL else {}),
    )
    found.loss.backward(case["upstream"])
    judge(name, (found.loss.detach(), hidden.grad, weight.grad), exact(name, case))
    here = case["mask"] & case["full"].bool()
    assert (found.weight[here] == 1).all() and here.any()


def from_hidden(name: str, case: dict, group, design: str, full: bool = True) -> tuple:
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    weight = case["weight"].chunk(size)[rank].clone().requires_grad_()
    hidden = case["hidden"].clone().requires_grad_()
    out = linear_head_loss(
        hidden, weight, case["labels"], objective=objective_of(name), mask=case["mask"],
        group=group, chunk_size=5, stats=stats_of(case, full), design=design,
    )  # fmt: skip
    out.loss.backward(case["upstream"])
    return out.loss.detach(), hidden.grad, weight.grad


HEAD = [n for n in PARAMETERS if n not in HAS_KL]


@pytest.mark.parametrize("name", HEAD)
def test_from_hidden_states(name):
    case = make_case()
    objective = objective_of(name)
    serves = objective.per_token and "entropy" not in objective.needs
    designs = ["recompute"] + (["forward"] if serves else [])
    for design in designs:
        judge(name, from_hidden(name, case, None, design), exact(name, case))


def on_a_rank() -> dict:
    torch.set_num_threads(1)
    return {n: from_hidden(n, make_case(), dist.group.WORLD, "auto") for n in HEAD}


def test_from_hidden_states_over_vocabulary_shards():
    ranks = run_ranks(on_a_rank, 2)
    for name in HEAD:
        (loss, d_hidden, first), (same, _, second) = ranks[0][name], ranks[1][name]
        assert torch.equal(loss, same)
        judge(name, (loss, d_hidden, torch.cat([first, second])), exact(name, make_case()))


@pytest.mark.parametrize("name", HEAD)
def test_no_other_token_changes(name):
    case = make_case()
    with_it = from_hidden(name, case, None, "recompute")[0]
    without = from_hidden(name, case, None, "recompute", full=False)[0]
    elsewhere = case["full"] == 0
    assert torch.equal(with_it[elsewhere], without[elsewhere])
    if name != "sft":
        assert not torch.equal(with_it, without)


def test_an_impossible_end_is_an_infinite_loss_and_not_hidden():
    log_prob = torch.tensor([float("-inf"), float("-inf")], requires_grad=True)
    stats = TokenStats(log_prob, torch.ones(2), full_weight=torch.tensor([0, 1]))
    loss, weight = registry.get("dft")(stats)
    assert loss.tolist() == [0.0, float("inf")] and weight.tolist() == [0.0, 1.0]


def test_the_report_tells_the_probability_of_ends_apart():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.9]])
    mask, ends = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[False, True, True, True]])
    nothing = torch.zeros_like(p)
    report = loss_report(None, -p.log(), nothing, nothing, mask, None, ends=ends)
    assert report[END_PROB].tolist() == pytest.approx([0.375, 2])
    assert END_PROB not in loss_report(None, -p.log(), nothing, nothing, mask, None)


def test_the_probability_of_ends_is_that_of_all_ends_of_the_steps():
    """A step may have none, and steps have unequally many."""
    figures = StepFigures()
    kinds = [[True, True, True], [False, False, False], [True, False, False]]
    for step, kind in enumerate(kinds):
        p = torch.tensor([[0.2, 0.4, 0.6]]) / (step + 1)
        nothing = torch.zeros_like(p)
        figures.add(*token_figures("dft", -p.log(), nothing, nothing, torch.ones(1, 3), None,
                                   ends=torch.tensor([kind])))  # fmt: skip
        figures.close_step(keep=True)
    found, steps = figures.take(None)
    assert steps == 3 and not [name for name in found if "number of" in name]
    assert float(found[END_PROB]) == pytest.approx((0.2 + 0.4 + 0.6 + 0.2 / 3) / 4)
