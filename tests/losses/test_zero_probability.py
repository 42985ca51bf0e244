"""A target of probability 0 (log p = −inf, in the model, the reference or both) gives no NaN."""

import pytest
import torch

from megatron_dft.losses import registry
from megatron_dft.losses.token_stats import TokenStats

INF = float("inf")
# The model's and the reference's log p: impossible to both, to the model, to the reference; likely.
LOG_PROB = [-INF, -INF, -0.5, -0.25, -3.0, -1e-6]
REFERENCE = [-INF, -1.0, -INF, -0.5, -2.0, -0.1]
CASES = {name: {} for name in registry.OBJECTIVES} | {
    "iw-sft by conversation": dict(level="sequence"),
    "dft-mix of cross entropy alone": dict(alpha=0.0),
    "p-alpha as cross entropy": dict(alpha=0.0),
    "talr with a temperature": dict(tau=0.5),
    "dcr without a border": dict(tau=0.0),
}
NAMES = {
    "iw-sft by conversation": "iw-sft",
    "dft-mix of cross entropy alone": "dft-mix",
    "p-alpha as cross entropy": "p-alpha",
    "talr with a temperature": "talr",
    "dcr without a border": "dcr",
}


def _stats(log_prob, reference, segments):
    count = len(log_prob)
    return TokenStats(
        log_prob,
        mask=torch.ones(count),
        segment_ids=segments,
        num_segments=2,
        entropy=torch.rand(count),
        entropy_top20=torch.rand(count),
        sum_sq_prob=torch.rand(count).clamp(min=0.1),
        reference_log_prob=torch.tensor(reference),
        kl=torch.rand(count),
        reward=torch.tensor([0.7, -0.4] * count)[:count],
    )


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    objective = registry.get(NAMES.get(case, case), **CASES[case])
    torch.manual_seed(0)
    log_prob = torch.tensor(LOG_PROB, requires_grad=True)
    # The impossible ones share a conversation with one that is not; the others have their own.
    segments = torch.tensor([0, 0, 0, 0, 1, 1])
    loss, weight = objective(_stats(log_prob, REFERENCE, segments))
    loss.sum().backward()
    assert not loss.isnan().any() and weight.isfinite().all()
    assert log_prob.grad.isfinite().all()
    assert torch.equal(log_prob.grad, -weight)
    assert loss[3:].isfinite().all()
    signed = objective.entry.per_pair or "reward" in objective.needs
    assert signed or (weight >= 0).all()
    if objective.entry.per_batch or objective.needs - {"reference_log_prob"}:
        return
    if objective.entry.per_pair:  # the two conversations are one
        return
    # The other conversation is as it is alone.
    alone = torch.tensor(LOG_PROB[4:])
    expected, _ = objective(_stats(alone, REFERENCE[4:], segments[4:]))
    torch.testing.assert_close(loss[4:].detach(), expected)


def test_impossible_to_both_is_as_likely_to_both():
    stats = _stats(torch.tensor([-INF]), [-INF], torch.tensor([0]))
    assert registry.get("iw-sft")(stats).weight.tolist() == [1.0]
    assert registry.get("psft")(stats).weight.tolist() == [1.0]
