"""PriFT-mass: the reference's mass at or below the target's probability, on vocabulary shards."""

import pytest
import torch

from megatron_dft.losses import prior_mass, registry
from megatron_dft.losses.prior_mass import log_mass
from megatron_dft.losses.token_stats import TokenStats
from tests.ranks import run_ranks

TOKENS, VOCABULARY = 40, 30


def _case():
    """Logits fp64 with ties, and a target of each rank from the first choice to the last."""
    generator = torch.Generator().manual_seed(4)
    logits = (2 * torch.randn(TOKENS, VOCABULARY, generator=generator).double()).round()
    return logits, torch.arange(TOKENS) % VOCABULARY


def _dense(logits, target):
    """Σ_v q(v)·1[q(v) ≤ q(y)], from the formula."""
    found = []
    for row, y in zip(logits, target, strict=True):
        q = row.softmax(-1)
        found.append(sum(float(q[v]) for v in range(len(q)) if row[v] <= row[y]))
    return torch.tensor(found, dtype=torch.float64)


def test_the_mass_is_the_formula_s_and_1_at_the_first_choice(monkeypatch):
    monkeypatch.setattr(
        prior_mass, "row_chunks", lambda tokens, *_: [slice(0, 7), slice(7, tokens)]
    )
    logits, target = _case()
    mass = log_mass(logits, target).exp()
    torch.testing.assert_close(mass, _dense(logits, target), rtol=0, atol=1e-12)
    first = logits.argmax(-1)
    assert log_mass(logits, first).abs().max() < 1e-12
    padded = torch.cat([logits, torch.full((TOKENS, 6), 50.0).double()], -1)
    torch.testing.assert_close(log_mass(padded, target, vocab_size=VOCABULARY).exp(), mass)
    assert log_mass(logits, torch.full_like(target, -100)).eq(-torch.inf).all()


def _on_a_shard():
    import torch.distributed as dist

    logits, target = _case()
    padded = torch.cat([logits, torch.full((TOKENS, 18), 50.0).double()], -1)  # 24 a rank
    shard = padded.chunk(2, -1)[dist.get_rank()]
    return log_mass(shard, target, dist.group.WORLD, vocab_size=VOCABULARY)


def test_shards_of_the_vocabulary_give_the_same_mass():
    for found in run_ranks(_on_a_shard, 2):
        torch.testing.assert_close(found.exp(), _dense(*_case()), rtol=0, atol=1e-12)


def test_prift_mass_keeps_what_the_reference_supports():
    """Gradient 1[u ≥ 0.5]·(softmax − onehot), whatever the trained model's p is."""
    logits, target = _case()
    own = torch.zeros(TOKENS, VOCABULARY, dtype=torch.float64, requires_grad=True)
    log_prob = own.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    objective = registry.get("nll-threshold", threshold=0.5, weight_from="reference-mass")
    stats = TokenStats(log_prob, torch.ones(TOKENS), reference_log_prob=log_mass(logits, target))
    loss, weight = objective(stats)
    loss.sum().backward()
    kept = _dense(logits, target) >= 0.5
    assert 0 < int(kept.sum()) < TOKENS and (weight == kept).all()
    expected = (own.detach().softmax(-1) - torch.nn.functional.one_hot(target, VOCABULARY)) * kept[
        :, None
    ]
    torch.testing.assert_close(own.grad, expected)


def test_a_rule_that_is_not_of_p_takes_no_mass():
    with pytest.raises(ValueError, match="--dft-weight-from reference-mass: --loss eaft has no"):
        registry.get("eaft", weight_from="reference-mass")
