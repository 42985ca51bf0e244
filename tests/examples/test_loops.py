"""examples/loops: the gradients are the formula's, on one rank and on two, and it learns."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from examples.loops import from_hidden_states, from_logits
from tests.ranks import run_ranks

IGNORED = -100


def _dft(logits, labels, tokens):
    """−sg(p)·log p over the supervised tokens of a step, in float64, from dense logits."""
    supervised = labels != IGNORED
    log_prob = logits.log_softmax(-1)[supervised].gather(1, labels[supervised].unsqueeze(1))
    return (-log_prob.exp().detach() * log_prob).sum() / tokens


def _count(micro_batches, labels_of):
    return sum(int((labels_of(batch) != IGNORED).sum()) for batch in micro_batches)


def _take(batches, number):
    return [next(batches) for _ in range(number)]


def _logits_gradients():
    """(this rank's gradients by our loss, by the formula): the output rows' and the rest."""
    group = dist.group.WORLD if dist.is_initialized() else None
    model = from_logits.Model(group, torch.float64)
    micro_batches = _take(from_logits.batches(3), 3)
    from_logits.step(model, micro_batches)
    whole = from_logits.Model(None, torch.float64)
    pairs = [from_logits.shifted(*batch) for batch in micro_batches]
    tokens = _count(pairs, lambda pair: pair[1])
    for ids, labels in pairs:
        _dft(whole(ids), labels, tokens).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    exact = {name: p.grad for name, p in whole.named_parameters()}
    if group is not None:
        exact["output"] = exact["output"].chunk(2)[dist.get_rank()]
    return ours, exact


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_logits_has_the_formulas_gradients(ranks):
    for ours, exact in [_logits_gradients()] if ranks == 1 else run_ranks(_logits_gradients, 2):
        assert ours.keys() == exact.keys() and exact["output"].any()
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name], rtol=1e-9, atol=1e-12)


def _hidden_gradients(objective):
    """(all ranks' summed gradients by our loss, those of the formula)."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    model = from_hidden_states.load(None).double()
    micro_batches = _take(from_hidden_states.batches(3), 4)
    from_hidden_states.step(model, micro_batches[rank::size], objective, group)
    whole = from_hidden_states.load(None).double()
    tokens = _count(micro_batches, lambda batch: batch[1])
    for ids, labels in micro_batches:
        logits = whole(input_ids=ids[:, :-1]).logits
        if objective == "dft":
            _dft(logits, labels, tokens).backward()
        else:
            plain = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
            (plain / tokens).backward()
    return [p.grad for p in model.parameters()], [p.grad for p in whole.parameters()]


@pytest.mark.parametrize(("ranks", "objective"), [(1, "dft"), (1, "sft"), (2, "dft")])
def test_from_hidden_states_has_the_formulas_gradients(ranks, objective):
    alone = ranks == 1
    found = [_hidden_gradients(objective)] if alone else run_ranks(_hidden_gradients, 2, objective)
    for ours, exact in found:
        assert all(gradient.any() for gradient in exact)
        # transformers' norms are computed in fp32 whatever the model is in.
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9)


def _history(steps, base_steps):
    return from_logits.train(steps, base_steps, dist.group.WORLD)


def test_from_logits_learns_alike_on_two_ranks():
    alone = from_logits.train(40, 40)
    for history in run_ranks(_history, 2, 10, 10):
        for left, right in zip(history[:10], alone, strict=False):
            assert left == pytest.approx(right, rel=1e-4)
    assert alone[0]["weight"] == alone[39]["weight"] == 1, "cross entropy"
    assert alone[40]["weight"] + 0.1 < alone[79]["weight"] < 1, "DFT: the mean probability"
    assert alone[79]["loss"] < alone[40]["loss"] / 1.2


def test_from_hidden_states_learns(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["from_hidden_states.py"])
    from_hidden_states.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "sft" in first and "accuracy 0.0" in first
    assert "dft" in last and float(last.split()[-1]) > 0.9
