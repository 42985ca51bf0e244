"""Pairs of answers: TRL's layouts, what is refused, and that a pair stays in one row."""

import json

import numpy as np
import pytest

from megatron_dft.data.conversation import RowError
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.pairs import parse_pair
from megatron_dft.data.schema import NothingToTrain, parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED, RowKind
from tests.data.fixtures import chatml_tokenizer, write_jsonl

PAIRS = RowKind("pairs")
USER = {"role": "user", "content": "q"}


def says(text):
    return {"role": "assistant", "content": text}


def _talks(prompt, good, bad):
    return {"prompt": prompt, "chosen": [says(good)], "rejected": [says(bad)]}


@pytest.mark.parametrize(
    "row",
    [
        _talks([USER], "yes", "no"),
        {"chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
        # As several public data sets have it: the prompt once more, as text.
        {"prompt": "q", "chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
    ],
)
def test_conversations_in_trl_s_layouts(row):
    chosen, rejected = parse_pair(row)
    assert chosen.messages == [USER, says("yes")] and rejected.messages == [USER, says("no")]
    assert chosen.trained == rejected.trained == [1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
    ],
)
def test_text_in_trl_s_layouts(row):
    chosen, rejected = parse_pair(row)
    assert chosen.text == ("2 + 2 =", " 4") and rejected.text == ("2 + 2 =", " 5")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, 'the row has no "rejected"'),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, 'the row has no "chosen"'),
        ({"prompt": "q", "chosen": "a", "rejected": [says("b")]}, "both be text or both be lists"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: the answer is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "of the answers' kind, not a number"),
        ({"chosen": "a", "rejected": "b"}, 'no "prompt", and its answers do not begin alike'),
        ({"prompt": "q", "chosen": 1, "rejected": 2}, "not a number and a number"),
        (_talks([USER], "", "b"), "chosen: .* empty content"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}, "no weight other than 1"),
        ([], "must be a JSON object"),
    ],
)
def test_a_bad_pair_is_one_line(row, reason):
    with pytest.raises(RowError, match=reason) as error:
        parse_pair(row)
    assert "\n" not in str(error.value)


def test_a_pair_of_weight_0_is_left_out_and_chat_refuses_pairs():
    with pytest.raises(NothingToTrain):
        parse_pair({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0})
    with pytest.raises(RowError, match="--loss dpo"):
        parse_row({"prompt": "q", "chosen": "a", "rejected": "b"}, None)


def _build(path, **options):
    given = {"seq_length": 96, "seed": 5, "rows": PAIRS, **options}
    return build_dataset([path], chatml_tokenizer(), DatasetOptions(**given))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows = [_talks([USER], f"yes {'a' * (n % 7)}", f"no {'b' * n}") for n in range(9)]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.mark.parametrize("pad_multiple", [1, 4])
def test_both_answers_of_a_pair_lie_side_by_side_in_one_row(path, pad_multiple):
    data = _build(path, pad_multiple=pad_multiple)
    seen = []
    for index in range(data.rows_per_pass):
        members = data.plan.members(index)
        assert len(members) % 2 == 0
        assert (members[::2] % 2 == 0).all() and (members[1::2] == members[::2] + 1).all()
        row = data[index]
        edges = row["cu_seqlens"].tolist()
        for number, member in enumerate(members.tolist()):
            flagged = data.conversations[member]
            own = slice(edges[number], edges[number] + len(flagged) - 1)
            assert row["tokens"][own].tolist() == (flagged[:-1] & ID_MASK).tolist()
        seen += (members[::2] // 2).tolist()
    assert sorted(seen) == list(range(9)), "each pair once an epoch"
    texts = [chatml_tokenizer().decode(_trained(data, m)) for m in (0, 1)]
    assert texts[0].startswith("yes") and texts[1].startswith("no")


def test_pairs_are_held_out_whole_and_read_once_in_evaluation(path):
    train = _build(path, valid_share=0.4)
    valid = _build(path, valid_share=0.4, held_out_part=True, shuffle=False, batch_multiple=4)
    held = [valid.plan.members(index) for index in range(valid.rows_per_pass)]
    assert len(held) == 4 and not len(held[-1]), "filled up with empty rows"
    first = np.concatenate([members[::2] for members in held])
    assert (np.concatenate([members[1::2] for members in held]) == first + 1).all()
    rejected = [
        {_text(data, n) for n in range(1, len(data.conversations), 2)} for data in (train, valid)
    ]
    assert list(map(len, rejected)) == [5, 4] and not rejected[0] & rejected[1]


def _text(data, number):
    return chatml_tokenizer().decode(_trained(data, number))


def _trained(data, number):
    flagged = data.conversations[number]
    return (flagged[(flagged & SUPERVISED) != 0] & ID_MASK).astype(np.int64)


def test_a_pair_with_one_answer_too_long_is_dropped_whole_and_counted(tmp_path):
    rows = [_talks([USER], "yes", "no"), _talks([USER], "yes", "b" * 90), _talks([USER], "c", "d")]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match="with the other answer of its pair; raise --seq-length"):
        _build(path)
    data = _build(path, overlong="drop")
    assert data.counts["overlong_dropped"] == 2 and len(data.conversations) == 4
    assert [data.conversations.where(n).rsplit(":", 1)[1] for n in range(4)] == ["1", "1", "3", "3"]


def test_bad_pairs_are_counted_by_kind(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [good, {"prompt": "q", "chosen": "a"}, {**good, "rejected": "a"}, good]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = _build(path, errors="skip", max_bad_rows=2)
    counts = data.conversations.stores[0].meta["counts"]
    assert counts["bad_rows"] == 2 and len(data.conversations) == 4
    kinds = {k: v for k, v in counts.items() if k.startswith("bad_rows: ")}
    assert sorted(kinds.values()) == [1, 1] and any("the same" in k for k in kinds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": False}, "--no-packing: both answers"),
        ({"overlong": "truncate"}, "--overlong truncate: would cut"),
        ({"data_format": "messages"}, "--data-format messages: rows are pairs"),
    ],
)
def test_options_that_do_not_go_with_pairs(path, options, words):
    with pytest.raises(ValueError, match=words):
        _build(path, **options)
