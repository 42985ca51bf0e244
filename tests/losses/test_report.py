"""The figures of a step: packed into one vector, and equal to sums written out one by one."""

import torch

from megatron_dft.losses.report import (
    CROSS_ENTROPY,
    HISTOGRAM_BINS,
    TOKENS,
    StepFigures,
    histogram_key,
    loss_report,
    token_figures,
)
from tests.ranks import run_ranks


def _micro_batch(seed, tokens=40):
    draw = torch.Generator().manual_seed(seed)
    cross_entropy = torch.rand(2, tokens, generator=draw) * 4
    mask = (torch.rand(2, tokens, generator=draw) < 0.4).float()
    cross_entropy[0, :2], mask[0, :2] = 0.0, 1.0  # p = 1 belongs to the last bin
    cross_entropy[mask == 0] = float("nan")
    weight = torch.rand(2, tokens, generator=draw)
    correct = torch.rand(2, tokens, generator=draw) < 0.5
    return cross_entropy, torch.nan_to_num(weight * cross_entropy), weight, mask, correct


def _expected(cross_entropy, token_loss, weight, mask, correct):
    """name → sum over the supervised tokens, token by token."""
    found = dict.fromkeys([histogram_key(i) for i in range(HISTOGRAM_BINS)], 0.0)
    names = [CROSS_ENTROPY, "dft loss", "dft/mean-weight", "dft/mean-prob", "dft/token-accuracy"]
    found |= dict.fromkeys(names, 0.0)
    for place in mask.nonzero().tolist():
        b, s = place
        p = torch.exp(-cross_entropy[b, s]).item()
        values = cross_entropy[b, s], token_loss[b, s], weight[b, s], p, correct[b, s]
        for name, value in zip(names, values, strict=True):
            found[name] += float(value)
        found[histogram_key(min(int(p * 10), 9))] += 1
    return found


def test_sums_of_a_micro_batch():
    given = _micro_batch(0)
    names, sums = token_figures("dft", *given)
    expected = _expected(*given)
    assert set(names) == set(expected)
    for name, value in zip(names, sums, strict=False):
        torch.testing.assert_close(float(value), expected[name], rtol=1e-5, atol=1e-5)
    assert float(sums[-1]) == float(given[3].sum())
    report = loss_report("dft", *given)
    assert report["dft loss"].tolist() == [float(sums[names.index("dft loss")]), float(sums[-1])]
    assert set(loss_report(None, *given)) == {
        CROSS_ENTROPY,
        "dft/mean-prob",
        "dft/token-accuracy",
    }


def test_the_loss_of_each_source():
    """Over several steps, one of which has no token of one source."""
    figures, total, count = StepFigures(), [0.0, 0.0], [0, 0]
    for step in range(3):
        given = _micro_batch(step)
        cross_entropy, mask = given[0], given[3]
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 2, mask.shape, generator=draw).to(torch.int16)
        if step == 1:
            ids.zero_()
        ids[mask == 0] = -1
        figures.add(*token_figures("dft", *given, None, sources=(ids, ["a.jsonl", "b"])))
        figures.close_step(keep=True)
        for number in range(2):
            total[number] += float(cross_entropy[ids == number].sum())
            count[number] += int((ids == number).sum())
    found, _ = figures.take(None)
    for number, name in enumerate(["a.jsonl", "b"]):
        expected = total[number] / count[number]
        assert abs(float(found[f"lm loss of {name}"]) - expected) < 1e-5
    assert not [name for name in found if name.startswith("number of")]


def _steps(rank_count):
    """Two kept steps of two micro-batches a rank and a skipped one between them, read at once."""
    rank = torch.distributed.get_rank()
    figures = StepFigures()
    for step in range(3):
        for micro_batch in range(2):
            seed = 100 * step + 10 * micro_batch + rank
            figures.add(*token_figures("dft", *_micro_batch(seed)))
        figures.close_step(keep=step != 1)
    found, steps = figures.take(torch.distributed.group.WORLD)
    assert figures.take(torch.distributed.group.WORLD) == ({}, 0)
    return {name: float(value) for name, value in found.items()}, steps


def test_steps_are_averaged_over_all_ranks_tokens():
    (found, steps), other = run_ranks(_steps, 2, 2)
    assert (found, steps) == other and steps == 2
    means, tokens = [], 0.0
    for step in (0, 2):
        parts = [_micro_batch(100 * step + 10 * m + r) for m in range(2) for r in range(2)]
        sums = [_expected(*part) for part in parts]
        count = sum(float(part[3].sum()) for part in parts)
        means.append({name: sum(s[name] for s in sums) / count for name in sums[0]})
        tokens += count / len(parts)
    for name, value in found.items():
        expected = tokens if name == TOKENS else sum(m[name] for m in means) / 2
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
