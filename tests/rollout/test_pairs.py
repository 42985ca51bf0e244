"""Pairs of a prompt's own answers: which ones, and rows that training reads."""

import pytest

from megatron_dft.data.pairs import parse_pair
from megatron_dft.rollout.keep import KeepRules, select
from megatron_dft.rollout.pairs import pair_rows, pair_up
from tests.rollout.test_keep import SAMPLES, rewarded


def _pairs(samples, per_prompt=None, threshold=1.0):
    kept, left = select(samples, KeepRules(keep="pairs", threshold=threshold))
    pairs, alone = pair_up(kept, threshold, per_prompt)
    assert 2 * len(pairs) + sum(alone.counts.values()) + sum(left.counts.values()) == len(samples)
    return pairs, alone


def test_right_with_wrong_of_the_same_prompt():
    more = [*SAMPLES[:4], rewarded(0, 4, "x", 0.0), rewarded(0, 5, "y", 0.0), *SAMPLES[4:]]
    pairs, alone = _pairs(more)
    assert [(a.text, b.text) for a, b in pairs] == [("a", "c"), ("b", "x")]
    assert alone.counts == {"without a partner": 1, "all of a prompt alike": 3}
    assert [(a.text, b.text) for a, b in _pairs(more, per_prompt=1)[0]] == [("a", "c")]
    assert [(a.text, b.text) for a, b in _pairs(more, threshold=0.2)[0]] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("raw", [False, True])
def test_rows_are_what_training_takes(raw):
    rows = list(pair_rows(_pairs(SAMPLES)[0], raw))
    (row,) = rows
    assert row["prompt_number"] == 0 and row["sample_numbers"] == [0, 3]
    for side, text in zip(parse_pair(row), ("a", "c"), strict=True):
        assert text in (side.text or [side.messages[-1]["content"]]) and not side.unread
    if raw:
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("q0", "a", "c")
    else:
        assert row["chosen"] == [{"role": "assistant", "content": "a"}]


def test_a_pair_has_no_weight():
    with pytest.raises(ValueError, match="--weight reward: --keep pairs takes 'one'"):
        KeepRules(keep="pairs", weight="reward").check()
