"""Scores against values worked out by hand, intervals against published ones."""

import numpy as np
import pytest

from megatron_dft.rollout import metrics
from megatron_dft.rollout.metrics import Scored

PROMPTS = [
    Scored([True, False, False, False], ["1", "2", "2", "3"]),
    Scored([False, True, True, False], ["9", "4", "4", None]),
    Scored([True, False, True, False], ["a", "b", "a", "b"]),
    Scored([False, False, False, False], [None, None, None, None]),
]


def test_pass_average_and_majority():
    assert metrics.pass_at_1(PROMPTS).value == 2 / 4
    assert metrics.average_at_k(PROMPTS).value == (1 / 4 + 2 / 4 + 2 / 4 + 0) / 4
    # 2 is wrong; 4 is right; of a and b, equally frequent, a came first; nothing to vote for.
    assert [metrics.majority_is_right(p) for p in PROMPTS] == [False, True, True, False]
    assert metrics.majority_at_k(PROMPTS).value == 2 / 4


def test_majority_of_right_and_wrong_where_no_answers_are_named():
    assert metrics.majority_is_right(Scored([True, True, False], [None] * 3))
    assert not metrics.majority_is_right(Scored([True, False], [None] * 2))


@pytest.mark.parametrize(
    # Newcombe (1998), Table I, method 3: the score interval without continuity correction.
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right, count, low, high):
    found = metrics.wilson(right, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == right / count


def test_bootstrap_covers_what_the_normal_approximation_does():
    values = np.random.default_rng(1).choice([0, 0.25, 0.5, 1.0], size=400)
    found = metrics.bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert metrics.bootstrap(values) == found  # the same every time


def test_samples_of_one_prompt_are_not_independent():
    """Sixteen alike samples of 25 prompts tell no more than one sample of each."""
    prompts = [Scored([n % 2 == 0] * 16, ["x"] * 16) for n in range(25)]
    found = metrics.average_at_k(prompts)
    assert found.high - found.low > 0.35  # as 400 independent samples it would be 0.10


def test_nothing_right_is_no_certainty():
    found = metrics.average_at_k([Scored([False] * 4, [None] * 4)] * 20)
    assert (found.value, found.low, round(found.high, 4)) == (0, 0, 0.1611)
    assert metrics.mean_of([found, found]).high == found.high


def test_differences_are_paired():
    before = np.random.default_rng(2).random(50)
    gain = metrics.difference(metrics.bootstrap(before + 0.1), metrics.bootstrap(before))
    assert gain.value == pytest.approx(0.1) and gain.high - gain.low < 1e-12


def test_mean_over_sets_resamples_each():
    small, large = metrics.bootstrap(np.array([0.0, 1.0])), metrics.bootstrap(np.full(9, 0.5))
    found = metrics.mean_of([small, large])
    assert found.value == 0.5 and (found.low, found.high) == (0.25, 0.75)
