"""--columns, --mask-history, --max-samples, --no-shuffle, copies and repeats."""

import argparse

import numpy as np
import pytest

from megatron_dft.commands import diagnose, retention
from megatron_dft.data import repeats, scored_text
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.fingerprint import differences
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.reading import Reading, parse_columns
from megatron_dft.data.schema import RowError
from tests.data.fixtures import chat, chatml_tokenizer, decoded, prepare_file, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def rows(count, name="a"):
    return [{"messages": chat(f"{name}{i}?", f"{name} {i}.")} for i in range(count)]


def build(items, tokenizer, **options):
    return build_dataset(items, tokenizer, DatasetOptions(**{"seq_length": 64, **options}))


def test_diagnose_and_retention_read_the_columns_that_training_reads(tmp_path, tokenizer):
    plain = [{"instruction": "1+1?", "output": "2"}]
    other = [{"question": "1+1?", "answer": "2"}]
    paths = [
        str(write_jsonl(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((plain, other))
    ]
    for command in (diagnose, retention):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        given = parser.parse_args(["m", "d", "--columns", "instruction=question", "output=answer"])
        reading = Reading(given.data_format, parse_columns(given.columns))
        (expected,) = scored_text.conversations(paths[:1], tokenizer, "DATA")
        (found,) = scored_text.conversations(paths[1:], tokenizer, "DATA", reading)
        assert all((a == b).all() for a, b in zip(expected, found, strict=True))
        assert expected[1].any()


def test_columns_are_read_under_their_own_names():
    reading = Reading(columns=parse_columns(["output=answer", "instruction=question"]))
    found = reading.parse({"question": "1+1?", "answer": "2", "output": "old", "id": 7})
    assert [m["content"] for m in found.messages] == ["1+1?", "2"]
    assert found.notes == ["column 'id' is not read"]
    with pytest.raises(RowError, match="--columns names 'question'; its columns are 'answer', 'q'"):
        reading.parse({"q": "1+1?", "answer": "2"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt"], "expected NAME=COLUMN such as prompt=question, got 'prompt'"),
        (["prompt="], "expected NAME=COLUMN"),
        (["question=prompt"], "--columns question=prompt: expected one of messages, "),
        (["prompt=a", "prompt=b"], "prompt is given twice"),
    ],
)
def test_columns_that_mean_nothing(words, said):
    with pytest.raises(ValueError, match=said):
        parse_columns(words)


def test_the_last_turn_trains_alone():
    row = {"messages": chat("a", "b", "c", "d"), "weight": 0.5}
    assert Reading().parse(row).trained == [1, 3]
    found = Reading(mask_history=True).parse(row)
    assert found.trained == [3] and found.weights == {3: 0.5}


def test_the_last_turn_that_asks_to_train():
    messages = chat("a", "b", "c", "d")
    messages[3]["train"] = False
    assert Reading(mask_history=True).parse({"messages": messages}).trained == [1]


def test_the_first_rows_of_each_item(tmp_path, tokenizer):
    one = write_jsonl(tmp_path / "a.jsonl", rows(30))
    two = write_jsonl(tmp_path / "b.jsonl", rows(3, "b"))
    data = build([one, two], tokenizer, max_samples=5, in_order=True, packing=False)
    assert data.conversations.sizes() == [5, 3]
    (change,) = differences(build([one], tokenizer).identity,
                            build([one], tokenizer, max_samples=5).identity)  # fmt: skip
    assert change == "--max-samples was None, is 5"
    texts = [text for text, _ in decoded(prepare_file(one, tokenizer), tokenizer)][:5]
    kept = prepare_file(one, tokenizer, reading=Reading(max_samples=5))
    assert [text for text, _ in decoded(kept, tokenizer)] == texts


def test_no_shuffle_is_the_order_of_the_files_in_every_epoch(tmp_path, tokenizer):
    items = [write_jsonl(tmp_path / f"{n}.jsonl", rows(7, n)) for n in "ab"]
    data = build(items, tokenizer, in_order=True, packing=False, num_samples=28)
    members = [int(data.plan.members(i)[0]) for i in range(28)]
    assert members == [*range(14)] * 2
    packed = build(items, tokenizer, in_order=True, num_samples=None)
    firsts = [int(packed.plan.members(i)[0]) for i in range(packed.rows_per_pass)]
    assert firsts == sorted(firsts)
    shuffled = build(items, tokenizer, packing=False, num_samples=28)
    assert differences(shuffled.identity, data.identity) == [
        "--no-shuffle: shuffling was None, is False"
    ]
    with pytest.raises(ValueError, match="--no-shuffle: shares, cap= and epochs="):
        build([f"0.5:{items[0]}", f"0.5:{items[1]}"], tokenizer, in_order=True)


@pytest.mark.parametrize("cached", [True, False])
def test_copies_are_counted(tmp_path, tokenizer, cached):
    path = write_jsonl(tmp_path / "a.jsonl", rows(5) + rows(3) + rows(1, "b"))
    store = prepare_file(path, tokenizer, cache_dir=tmp_path / "c" if cached else None)
    assert store.meta["duplicates"] == 3


def test_repeats_of_an_item_are_said_and_many_warned_of(tmp_path, tokenizer):
    """40 rows at a share of 0.9: what nobody was told."""
    few = write_jsonl(tmp_path / "few.jsonl", rows(4))
    many = write_jsonl(tmp_path / "many.jsonl", rows(36, "b"))
    data = build([f"0.9:{few}", f"0.1:{many}"], tokenizer, packing=False, num_samples=100)
    epochs, found = repeats.repeats(data)
    assert epochs == pytest.approx(2.5)
    assert found == {few: pytest.approx(2.5 * 36 / 4), many: pytest.approx(2.5 * 4 / 36)}
    (warning,) = repeats.warnings(data)
    assert warning.startswith(f"{few}: each of its 4 conversations is trained on 22 times")
    assert f"{few} 22.5 times" in repeats.said(data)
    assert not repeats.warnings(build([few, many], tokenizer, packing=False, num_samples=160))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.25])
def test_the_rows_of_some_epochs_hold_every_conversation_so_often(
    tmp_path, tokenizer, packing, epochs
):
    path = write_jsonl(tmp_path / "a.jsonl", rows(40))
    count = build([path], tokenizer, packing=packing).plan.rows_of_epochs(epochs)
    data = build([path], tokenizer, packing=packing, num_samples=count)
    met = np.bincount(np.concatenate([data.plan.members(i) for i in range(count)]), minlength=40)
    assert met.min() == int(epochs) and met.max() == int(np.ceil(epochs))
    assert data.plan.epochs() == pytest.approx(epochs, abs=1 / data.rows_per_pass)
