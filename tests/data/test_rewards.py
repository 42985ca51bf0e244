"""A row's reward: as a weight, with a sign, and what is refused."""

import pytest

from megatron_dft.data.conversation import RowError
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.schema import NothingToTrain, parse_row
from megatron_dft.data.spec import RowKind
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl

WEIGHTED, SIGNED = RowKind("weighted"), RowKind("rewarded", -0.2)


def _row(**keys):
    return {"messages": chat("a", "b"), **keys}


@pytest.mark.parametrize(
    ("reading", "row", "weights"),
    [
        (WEIGHTED, _row(reward=0.5), {1: 0.5}),
        (WEIGHTED, _row(reward=1), {}),
        (WEIGHTED, _row(reward=True, weight=3), {1: 3.0}),
        (SIGNED, _row(reward=-1.5), {1: -1.5}),
        (SIGNED, _row(reward=0, weight=0.5), {1: -0.1}),
        (SIGNED, {"prompt": "a", "completion": "b", "reward": -2}, {0: -2.0}),
    ],
)
def test_the_reward_is_a_factor(reading, row, weights):
    found = parse_row(row, None, reading)
    assert found.weights == pytest.approx(weights) and not found.notes


def test_without_a_reading_a_reward_is_not_read():
    found = parse_row(_row(reward=-1), None)
    assert found.weights == {} and found.notes == ["column 'reward' is not read"]


@pytest.mark.parametrize(
    ("reading", "reward", "reason"),
    [
        (WEIGHTED, None, 'no "reward"'),
        (SIGNED, float("nan"), '"reward" must be a finite number, not nan'),
        (SIGNED, float("-inf"), "must be a finite number"),
        (SIGNED, 10**400, "must be a finite number"),
        (SIGNED, "1", '"reward" must be a number, not text'),
        (WEIGHTED, -0.5, "a weight has no sign, --loss rift"),
        (SIGNED, -1e-60, "fp32"),
    ],
)
def test_a_bad_reward_is_one_line(reading, reward, reason):
    with pytest.raises(RowError, match=reason) as error:
        parse_row(_row(reward=reward), None, reading)
    assert "\n" not in str(error.value)


def test_a_reward_of_0_is_left_out_where_it_counts_as_nothing():
    for reading in (WEIGHTED, RowKind("rewarded", 0.0)):
        with pytest.raises(NothingToTrain):
            parse_row(_row(reward=0), None, reading)


def test_signed_rewards_reach_the_rows_and_have_a_cache_of_their_own(tmp_path):
    rows = [_row(reward=r) for r in (1, -2, 0)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = dict(seq_length=128, cache_dir=tmp_path / "cache", shuffle=False)
    data = build_dataset([path], chatml_tokenizer(), DatasetOptions(rows=SIGNED, **given))
    row = data[0]
    found = row["token_weights"][row["loss_mask"] == 1]
    assert found.unique().tolist() == pytest.approx([-2, -0.2, 1])
    assert (row["token_weights"][row["loss_mask"] == 0] == 0).all()
    plain = build_dataset([path], chatml_tokenizer(), DatasetOptions(**given))
    assert "token_weights" not in plain[0]
