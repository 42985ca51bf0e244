"""Which samples train, with which weight, and why the others do not."""

import pytest

from megatron_dft.data.schema import parse_row
from megatron_dft.rollout.keep import KeepRules, select, training_rows
from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.rewards import Rewarded
from megatron_dft.rollout.verdict import Verdict

PROMPTS = [Prompt(n, [{"role": "user", "content": f"q{n}"}], n, f"f:{n + 1}") for n in range(3)]


def rewarded(prompt, sample, text, reward, finish="stop", answer=None):
    return Rewarded(PROMPTS[prompt], sample, text, finish, Verdict(reward, answer))


SAMPLES = [
    rewarded(0, 0, "a", 1.0, answer="1"),
    rewarded(0, 1, "a ", 1.0, answer="1"),
    rewarded(0, 2, "b", 1.0, answer="1"),
    rewarded(0, 3, "c", 0.25, answer="2"),
    rewarded(1, 0, "d", -1.0),
    rewarded(1, 1, "e", -0.5),
    rewarded(1, 2, "f", None),
    rewarded(1, 3, "  ", 1.0),
    rewarded(2, 0, "g", 1.0, finish="length"),
    rewarded(2, 1, "h", 1.0),
    rewarded(2, 2, "a NUL \0 in it", 1.0),
]


def kept(**rules):
    found, left = select(SAMPLES, KeepRules(**rules))
    assert len(found) + sum(left.counts.values()) == len(SAMPLES)  # nothing is lost
    return [f"{one.prompt.number}{one.text.strip()}" for one in found], left


def test_correct():
    found, left = kept()
    assert found == ["0a", "0b", "2h"]
    assert left.counts == {
        "not correct": 3,
        "like another of its prompt": 1,
        "without a reward": 1,
        "empty": 1,
        "cut off by --max-tokens": 1,
        "text that training would refuse": 1,
    }
    assert left.first["empty"] == "f:2, sample 3"


def test_best_all_threshold_caps_and_duplicates():
    assert kept(keep="best")[0] == ["0a", "1e", "2h"]
    assert kept(keep="best", per_prompt=2)[0] == ["0a", "0b", "1d", "1e", "2h"]
    assert kept(keep="all")[0] == ["0a", "0b", "0c", "1d", "1e", "2h"]
    assert kept(threshold=0.2)[0] == ["0a", "0b", "0c", "2h"]
    assert kept(per_prompt=1)[0] == ["0a", "2h"]
    assert kept(dedupe="answer")[0] == ["0a", "2h"]
    assert kept(dedupe="none")[0] == ["0a", "0a", "0b", "2h"]
    assert kept(cut=True)[0] == ["0a", "0b", "2g", "2h"]
    with pytest.raises(ValueError, match="--per-prompt"):
        KeepRules(per_prompt=0).check()


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [("one", [1, 1, 1, 1]), ("reward", [1, 1, 0.25, 1]), ("prompt", [1 / 3, 1 / 3, 1 / 3, 1])],
)
def test_weights(weight, wanted):
    rules = KeepRules(threshold=0.2, weight=weight)
    rows = list(training_rows(select(SAMPLES, rules)[0], rules, raw=False))
    assert [r["weight"] for r in rows] == wanted
    assert [r["reward"] for r in rows] == [1, 1, 0.25, 1]


def test_rows_are_what_training_reads():
    rules = KeepRules()
    found, _ = select(SAMPLES, rules)
    chat = next(training_rows(found, rules, raw=False))
    conversation = parse_row(chat, None)
    assert [m["content"] for m in conversation.messages] == ["q0", "a"]
    assert conversation.trained == [1]
    text = next(training_rows(found, rules, raw=True))
    assert parse_row(text, None).text == ("q0", "a")
    assert (chat["prompt_number"], chat["sample_number"]) == (0, 0)
