"""Diagnosis of tables written by hand: histogram, lists, classes, recommendation."""

import numpy as np
import pytest

from megatron_dft.drift import diagnosis


def scores_of(p_rows, targets):
    p = np.array(p_rows, dtype=np.float64)
    t = np.array(targets)
    return diagnosis.TokenScores(
        t,
        np.arange(len(t)),
        p[range(len(t)), t],
        -(p * np.log(np.maximum(p, 1e-300))).sum(1),
        (p**2).sum(1),
        p.argmax(1),
        p.max(1),
    )


WORDS = ["7", " the", "ing", ".", "\n", "<end>"]


def test_diagnosis_of_a_hand_made_table():
    even = [1 / 6] * 6
    flat = [0.05, 0.19, 0.19, 0.19, 0.19, 0.19]
    sure = [0.001, 0.995, 0.001, 0.001, 0.001, 0.001]
    p = [even, flat, sure, sure, even]
    targets = [1, 0, 0, 1, 5]
    got = diagnosis.diagnose([scores_of(p, targets)], WORDS.__getitem__, frozenset({5}))
    chosen = np.array([p[i][t] for i, t in enumerate(targets)])
    onehot = np.eye(6)[targets]
    sft = np.sqrt(((np.array(p) - onehot) ** 2).sum(1))  # ‖softmax − onehot‖, from its definition
    low = chosen < 0.1
    overall = got["overall"]
    assert overall["tokens"] == 5
    assert overall["mean_prob"] == pytest.approx(chosen.mean())
    assert overall["cross_entropy"] == pytest.approx(-np.log(chosen).mean())
    assert overall["low"] == pytest.approx(0.4)
    assert (overall["low_sure"], overall["low_unsure"]) == pytest.approx((0.2, 0.2))
    assert overall["low_sft_gradient"] == pytest.approx(sft[low].sum() / sft.sum())
    dft = chosen * sft
    assert overall["low_dft_gradient"] == pytest.approx(dft[low].sum() / dft.sum())
    assert sum(overall["histogram"]) == 5 and overall["histogram"][3] == 2
    assert {k: v["tokens"] for k, v in got["classes"].items()} == {
        "number": 2,
        "word": 2,
        "special": 1,
    }
    assert {k: v["tokens"] for k, v in got["places"].items()} == {"1": 1, "2–4": 3, "5–16": 1}
    words = got["without_special"]  # the end token's 1/6 does not count
    assert words["tokens"] == 4 and words["mean_prob"] == pytest.approx(chosen[:4].mean())
    assert f"{chosen[:4].mean():.3f}" in got["recommendation"]["reason"]
    wrong = got["confidently_wrong"]
    assert [(w["text"], w["count"], w["instead"]) for w in wrong] == [("7", 1, " the")]
    assert [w["text"] for w in got["missing_knowledge"]] == ["7"]
    assert np.sum(got["map"]["counts"]) == 5


def test_the_lists_name_what_the_model_would_rather_say():
    """The most frequent alternative, not the rarest; rare means rare in this data."""
    wrong_a = [0.001, 0.995, 0.001, 0.001, 0.001, 0.001]
    wrong_b = [0.001, 0.001, 0.995, 0.001, 0.001, 0.001]
    right_3, right_4 = np.eye(6)[3] * 0.94 + 0.01, np.eye(6)[4] * 0.94 + 0.01
    p = [wrong_a, wrong_b, wrong_a] + [right_3.tolist()] + [right_4.tolist()] * 20
    got = diagnosis.diagnose(
        [scores_of(p, [0, 0, 0, 3] + [4] * 20)], WORDS.__getitem__, frozenset({5})
    )
    (wrong,) = got["confidently_wrong"]
    assert (wrong["text"], wrong["count"], wrong["instead"]) == ("7", 3, " the")
    assert [w["text"] for w in got["rare_but_right"]] == ["."]


@pytest.mark.parametrize(
    ("text", "special", "want"),
    [
        ("<s>", True, "special"),
        ("\n\n", False, "space"),
        (" 12", False, "number"),
        (" the", False, "word"),
        ("ing", False, "word part"),
        (" +=", False, "symbol"),
        ("é", False, "word part"),
    ],
)
def test_token_classes(text, special, want):
    assert diagnosis.token_class(text, special) == want


@pytest.mark.parametrize(
    ("mean", "low", "sure", "loss"),
    [
        (0.8, 0.1, 0.0, "dft"),
        (0.51, 0.3, 0.3, "dft"),
        (0.05, 0.9, 0.0, "sft"),
        (0.3, 0.5, 0.2, "asft"),
        (0.3, 0.5, 0.1, "dft-mix"),
        (0.3, 0.0, 0.0, "dft-mix"),
    ],
)
def test_recommendation_follows_the_thresholds(mean, low, sure, loss):
    overall = {"mean_prob": mean, "low": low, "low_sure": sure, "low_sft_gradient": 0.5}
    got = diagnosis.recommend(overall)
    assert got["loss"] == loss and f"{mean:.3f}" in got["reason"]


def test_end_tokens_do_not_decide():
    """A sure end token behind each unknown word: the words are new to the model."""
    unsure, sure = [0.04, 0.24, 0.24, 0.24, 0.24, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    scores = scores_of([unsure, sure] * 9, [0, 5] * 9)
    got = diagnosis.diagnose([scores], WORDS.__getitem__, frozenset({5}))
    assert got["overall"]["mean_prob"] > 0.5 and got["recommendation"]["loss"] == "sft"
    only = diagnosis.diagnose([scores_of([sure], [5])], WORDS.__getitem__, frozenset({5}))
    assert only["recommendation"]["loss"] == "dft"


def test_ends_that_the_base_finds_unlikely_are_named_with_their_flag():
    surely, hardly = [0.02] * 5 + [0.9], [0.15] * 5 + [0.25]
    rows, targets = [hardly, surely, hardly], [1, 5, 5]
    got = diagnosis.diagnose([scores_of(rows, targets)], WORDS.__getitem__, frozenset({5}), [5])
    assert got["ends"]["tokens"] == 2 and got["ends"]["mean_prob"] == pytest.approx(0.575)
    assert "ends" not in got["recommendation"]
    rows[1] = hardly
    got = diagnosis.diagnose([scores_of(rows, targets)], WORDS.__getitem__, frozenset({5}), [5])
    assert "0.250" in got["recommendation"]["ends"]
    assert "--dft-full-weight end" in got["recommendation"]["ends"]
    unknown = diagnosis.diagnose([scores_of(rows, targets)], WORDS.__getitem__, frozenset({5}))
    assert unknown["ends"] is None and "ends" not in unknown["recommendation"]
