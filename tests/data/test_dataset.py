"""The rows that Megatron reads: keys, shift, mask, order, validation passes, errors."""

import pytest
import torch

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.tokenizer import load_tokenizer
from tests.data.fixtures import CHATML_TEMPLATE, chat, chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _rows(count):
    return [
        {"messages": chat(f"question {i}?", f"answer {i} " + "x" * (i % 7))} for i in range(count)
    ]


def _unpacked(path, tokenizer, **options):
    options = {"seq_length": 64, "packing": False, **options}
    return build_dataset([path], tokenizer, DatasetOptions(**options))


def test_a_row_is_the_templates_text_shifted_by_one(tmp_path, tokenizer):
    messages = chat("Hi", "\nHello 🙂\n", "more?", "ok", system="be kind")
    data = _unpacked(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    row = data[0]
    assert {k: (v.dtype, tuple(v.shape)) for k, v in row.items()} == {
        "tokens": (torch.int64, (64,)),
        "labels": (torch.int64, (64,)),
        "loss_mask": (torch.float32, (64,)),
        "position_ids": (torch.int64, (64,)),
        "padding_mask": (torch.bool, (64,)),
        "token_kinds": (torch.uint8, (64,)),
    }
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    used = data.conversations[0].shape[0] - 1
    assert text.startswith(tokenizer.decode(row["tokens"][:used]))
    trained = row["loss_mask"].bool()
    assert tokenizer.decode(row["labels"][trained]) == "\nHello 🙂\n<|im_end|>ok<|im_end|>"
    # A label is the next input, wherever there is one; elsewhere it is out of the vocabulary.
    assert (row["labels"][:-1][trained[:-1]] == row["tokens"][1:][trained[:-1]])[:-1].all()
    assert (row["labels"][~trained] == -100).all()
    assert row["position_ids"][:used].tolist() == list(range(used))


def test_the_eos_trains_although_it_also_pads(tmp_path, tokenizer):
    assert tokenizer.pad_token_id is None
    data = _unpacked(write_jsonl(tmp_path / "a.jsonl", _rows(1)), tokenizer)
    labels, mask = data[0]["labels"], data[0]["loss_mask"]
    assert (labels == tokenizer.eos_token_id).sum() == 1
    assert mask[labels == tokenizer.eos_token_id].item() == 1.0
    assert data[0]["tokens"][-1] == tokenizer.eos_token_id and mask[-1] == 0


def test_an_epoch_takes_every_row_once_and_epochs_differ(tmp_path, tokenizer):
    data = _unpacked(
        write_jsonl(tmp_path / "a.jsonl", _rows(20)), tokenizer, num_samples=60, seed=3
    )
    epochs = [[int(data.plan.members(20 * e + i)[0]) for i in range(20)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])


def test_the_order_depends_on_the_seed_and_not_on_the_length_or_the_reading(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(20))

    def order(**options):
        data = _unpacked(path, tokenizer, **options)
        return [data[i]["tokens"].tolist() for i in range(50)]

    full = order(num_samples=50, seed=1)
    assert order(num_samples=900, seed=1) == full
    assert order(num_samples=50, seed=2) != full
    late = _unpacked(path, tokenizer, num_samples=50, seed=1)
    assert [late[i]["tokens"].tolist() for i in range(49, 30, -1)] == full[49:30:-1]


def test_weights_set_the_share_of_each_source(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", _rows(30))
    b = write_jsonl(tmp_path / "b.jsonl", _rows(10))
    data = build_dataset(
        [f"0.25:{a}", f"0.75:{b}"],
        tokenizer,
        DatasetOptions(seq_length=64, packing=False, num_samples=120),
    )
    members = [int(data.plan.members(i)[0]) for i in range(120)]
    assert sum(m < 30 for m in members[:40]) == 10 and sum(m >= 30 for m in members[:40]) == 30
    # Ten rows an epoch of thirty: after three epochs each was seen once; the small source thrice.
    assert sorted(m for m in members if m < 30) == list(range(30))
    assert sorted(m for m in members[:40] if m >= 30) == sorted(list(range(30, 40)) * 3)


def test_validation_takes_each_row_once_and_fills_up_with_rows_that_do_not_count(
    tmp_path, tokenizer
):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(5))
    data = _unpacked(path, tokenizer, shuffle=False, batch_multiple=4, num_samples=16)
    assert data.rows_per_pass == 8 and len(data) == 16
    assert [data.plan.members(i).tolist() for i in range(8)] == [
        [0],
        [1],
        [2],
        [3],
        [4],
        [],
        [],
        [],
    ]
    assert all(torch.equal(data[i]["tokens"], data[i + 8]["tokens"]) for i in range(8))
    assert [data[i]["loss_mask"].sum() > 0 for i in range(8)] == [True] * 5 + [False] * 3


def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(5))
    with pytest.raises(ValueError, match="--seq-length 62 must be a multiple of 4"):
        _unpacked(path, tokenizer, seq_length=62, pad_multiple=4)
    with pytest.raises(ValueError, match="--overlong 'cut': expected one of refuse, drop, trunc"):
        _unpacked(path, tokenizer, overlong="cut")
    with pytest.raises(ValueError, match="a.jsonl:1, takes .* raise --seq-length"):
        _unpacked(path, tokenizer, seq_length=4)
    with pytest.raises(ValueError, match="weights mean nothing here"):
        _unpacked(f"2:{path}", tokenizer, shuffle=False)
    with pytest.raises(ValueError, match="nothere.jsonl' does not exist"):
        _unpacked(tmp_path / "nothere.jsonl", tokenizer)


def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole").chat_template == CHATML_TEMPLATE
    bare = chatml_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no chat template; give one with --chat-template"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "t.jinja").write_text(CHATML_TEMPLATE)
    assert load_tokenizer(tmp_path / "bare", tmp_path / "t.jinja").chat_template == CHATML_TEMPLATE
