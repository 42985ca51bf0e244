"""What says that a message trains, and how strongly, in every spelling; and where it ends up."""

import numpy as np
import pytest
import torch

from megatron_dft.data import prepare as prepare_module
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.prepare import notes
from megatron_dft.data.schema import NothingToTrain, RowError, parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from tests.data.fixtures import chat, chatml_tokenizer, decoded, prepare_file, write_jsonl
from tests.data.test_chat_mask import MARKED
from tests.data.tool_templates import chatml


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _turns(first, second):
    messages = chat("a", "wrong", "c", "right")
    messages[1].update(first)
    messages[3].update(second)
    return messages


NO_AND_YES = [
    ({key: no}, {key: yes})
    for key in (
        "train",
        "training",
        "loss",
        "loss_mask",
        "Loss-Mask",
        "lossMask",
        "TRAIN",
        "train_on_turn",
        "trainable",
        "doTrain",
    )
    for no, yes in ((False, True), (0, 1), (0.0, 1.0))
] + [
    ({"weight": 0}, {"weight": 1}),
    ({"weight": 0.0}, {}),
    ({"loss_weight": 0}, {"loss_weight": 1}),
    ({"train": True, "weight": 0}, {"train": True, "weight": 1}),
    ({"loss": False, "training": True}, {}),
    ({"train": None, "weight": 0}, {"train": None, "weight": None}),
]


@pytest.mark.parametrize("no, yes", NO_AND_YES)
def test_every_spelling_of_a_mask_is_honoured(no, yes):
    found = parse_row({"messages": _turns(no, yes)}, None)
    assert found.trained == [3] and found.weights == {}
    assert found.messages == chat("a", "wrong", "c", "right"), "templates never see these keys"
    sharegpt = [
        {"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]}
        | {k: v for k, v in m.items() if k not in ("role", "content")}
        for m in _turns(no, yes)
    ]
    assert parse_row({"conversations": sharegpt}, None).trained == [3]


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"loss": 0.5}, "message 1: loss must be true or false, not 0.5"),
        ({"loss_mask": [0, 1]}, "message 1: loss_mask must be true or false"),
        ({"training": "false"}, "message 1: training must be true or false, not 'false'"),
        ({"weight": "0"}, "message 1: weight must be a number of at least 0, not '0'"),
        ({"weight": True}, "message 1: weight must be a number of at least 0, not True"),
        ({"weight": float("inf")}, "weight must be a number of at least 0 that fp32 holds"),
        ({"weight": 1e39}, "weight must be a number of at least 0 that fp32 holds"),
        ({"weight": 10**400}, "weight must be a number of at least 0 that fp32 holds"),
        ({"weight": 1e-20, "loss_weight": 1e-40}, "message 1: the weights multiply to"),
        ({"training_detail": [{"end_offset": 1}]}, "training_detail masks by character"),
    ],
)
def test_a_key_that_says_neither_yes_nor_no_is_refused(keys, reason):
    with pytest.raises(RowError, match=reason):
        parse_row({"messages": _turns(keys, {})}, None)


def test_a_question_that_asks_to_train_is_said(tmp_path, tokenizer):
    messages = chat("a", "b")
    messages[0]["train"] = True
    store = prepare_file(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    assert list(notes(store)) == [
        "messages that ask to train and are not the assistant's do not train"
    ]


ROWS = [
    {"messages": chat("plain", "one")},
    {"messages": _turns({"weight": 0.5}, {"weight": 3})},
    {"messages": _turns({"weight": 0}, {}), "weight": 2},
    {"instruction": "i", "output": "o", "weight": 0.25},
    {"prompt": "p", "completion": "c", "weight": 4},
    {"messages": chat("left", "out"), "weight": 0},
    {"messages": _turns({"weight": 0.5}, {}), "weight": 0.5},
]
# (text, weight) of what trains in each row that is kept.
EXPECTED = [
    [("one", 1)],
    [("wrong", 0.5), ("right", 3)],
    [("right", 2)],
    [("o", 0.25)],
    [("c", 4)],
    [("wrong", 0.25), ("right", 0.5)],
]


def _weighted(store, tokenizer, index):
    """(text, weight) of each run of tokens of one weight; the end token belongs to its turn."""
    ids, weights = store.ids(index), store.token_weights(index)
    assert weights.dtype == np.float32
    assert np.array_equal(weights > 0, store.supervised(index)), "mask = weight > 0"
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    return [
        (tokenizer.decode(ids[a:b]).removesuffix("<|im_end|>"), float(weights[a]))
        for a, b in zip(borders, borders[1:], strict=False)
        if weights[a]
    ]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("rows_a_batch", [1, 1000])
def test_weights_of_messages_and_rows_multiply_and_reach_the_store(
    tmp_path, tokenizer, monkeypatch, cached, rows_a_batch
):
    monkeypatch.setattr("megatron_dft.data.readers.BATCH_ROWS", rows_a_batch)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    store = prepare_file(path, tokenizer, cache_dir=tmp_path / "c" if cached else None)
    found = [_weighted(store, tokenizer, i) for i in range(len(store))]
    assert found == EXPECTED and store.meta["counts"]["rows of weight 0"] == 1
    if cached:
        size = next((tmp_path / "c").rglob("weights.f32")).stat().st_size
        assert size == 4 * len(store.tokens)


def test_without_weights_none_are_stored(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"messages": _turns({"weight": 0}, {})}])
    store = prepare_file(path, tokenizer, cache_dir=tmp_path / "c")
    assert store.weights is None and not list((tmp_path / "c").rglob("weights.f32"))
    assert np.array_equal(store.token_weights(0), store.supervised(0).astype(np.float32))
    data = build_dataset([path], tokenizer, DatasetOptions(seq_length=64, cache_dir=tmp_path / "c"))
    assert "token_weights" not in data[0]


@pytest.mark.parametrize("pad_multiple", [1, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_carry_each_tokens_weight_in_line_with_its_label(
    tmp_path, tokenizer, packing, pad_multiple
):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    data = build_dataset(
        [path],
        tokenizer,
        DatasetOptions(seq_length=96, packing=packing, pad_multiple=pad_multiple, seed=5),
    )
    found = {}
    for index in range(data.rows_per_pass):
        row = data[index]
        weights, labels = row["token_weights"], row["labels"]
        assert weights.dtype == torch.float32
        assert torch.equal(weights > 0, row["loss_mask"] > 0)
        for value in weights.unique().tolist():
            if value:
                text = tokenizer.decode(labels[weights == value])
                found[value] = found.get(value, "") + text.replace("<|im_end|>", "|")
    whole = {0.25: {"o", "wrong"}, 0.5: {"wrong", "right"}, 1: {"one"}, 2: {"right"},
             3: {"right"}, 4: {"c"}}  # fmt: skip
    assert {v: set(t.split("|")) - {""} for v, t in found.items()} == whole


def test_a_cut_conversation_keeps_the_weights_of_what_is_left(tmp_path, tokenizer):
    messages = _turns({"weight": 0.5}, {"weight": 3, "content": "right " * 50})
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=64, overlong="truncate", packing=False)
    )
    assert set(data[0]["token_weights"].tolist()) == {0.0, 0.5}


def test_marks_carry_the_weights_of_their_turns(tmp_path):
    tokenizer, _ = chatml(MARKED)
    rows = [ROWS[1], {**ROWS[0], "weight": 7}]
    store = prepare_file(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert [_weighted(store, tokenizer, i) for i in range(2)] == [EXPECTED[1], [("one", 7)]]


def test_a_row_of_weight_0_alone_is_no_data(tmp_path, tokenizer):
    with pytest.raises(NothingToTrain):
        parse_row(ROWS[5], None)
    with pytest.raises(ValueError, match="no row can be trained on: all have weight 0"):
        prepare_file(write_jsonl(tmp_path / "a.jsonl", [ROWS[5]] * 2), tokenizer)


def test_processes_give_the_same_weights(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr("megatron_dft.data.readers.BATCH_ROWS", 2)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS * 3)
    one = prepare_file(path, tokenizer, workers=1)
    two = prepare_file(path, tokenizer, workers=2)
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.weights, two.weights)
    assert decoded(one, tokenizer) == decoded(two, tokenizer)
    assert (one.tokens & SUPERVISED).any() and (one.tokens & ID_MASK).max() < 1000
