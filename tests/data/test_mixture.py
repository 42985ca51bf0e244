"""Shares, caps and epochs of several sources, whose token is whose, and the held-out share."""

import numpy as np
import pytest

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.fingerprint import differences
from megatron_dft.data.held_out import held_out
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.sources import parse_sources
from tests.data.families import FAMILIES
from tests.data.fixtures import chat, chatml_tokenizer, prepare_file, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture
def files(tmp_path):
    return [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": chat(f"{name}{i}?", f"{name} {i}.")}
                                                 for i in range(count)])
        for name, count in (("a", 30), ("b", 10), ("c", 20))
    ]  # fmt: skip


def _build(items, tokenizer, **options):
    options = {"seq_length": 64, "packing": False, "num_samples": 300, **options}
    return build_dataset(items, tokenizer, DatasetOptions(**options))


def _drawn(data, epoch_rows, epochs):
    """Conversations of each source in each epoch."""
    members = [int(data.plan.members(i)[0]) for i in range(epoch_rows * epochs)]
    of = [data.conversations.source(m) for m in members]
    return [np.bincount(of[e * epoch_rows : (e + 1) * epoch_rows], minlength=3).tolist()
            for e in range(epochs)], members  # fmt: skip


def test_caps_and_epochs_set_what_each_source_gives(files, tokenizer):
    a, b, c = files
    data = _build([f"cap=12:{a}", f"epochs=2:{b}", f"epochs=0.5,cap=8:{c}"], tokenizer)
    assert data.rows_per_pass == 12 + 20 + 8
    counts, members = _drawn(data, 40, 5)
    assert counts == [[12, 20, 8]] * 5
    # A cap goes on where the last epoch stopped: each row is met before any is met twice.
    first = [m for m in members if m < 30]
    assert len(set(first[:24])) == 24 and sorted(first) == sorted([*range(30)] * 2)
    assert sorted(m for m in members[:40] if 30 <= m < 40) == sorted([*range(30, 40)] * 2)


def test_a_cap_bounds_a_share_and_gives_nothing_to_the_others(files, tokenizer):
    a, b, _ = files
    data = _build([f"0.5,cap=5:{a}", f"share=0.5:{b}"], tokenizer)
    assert _drawn(data, 25, 2)[0] == [[5, 20, 0]] * 2


def test_the_same_rows_in_every_layout_and_at_every_resume(files, tokenizer):
    items = [f"cap=12:{files[0]}", f"epochs=1.5:{files[1]}", files[2]]
    packed = [
        build_dataset(
            items, tokenizer, DatasetOptions(seq_length=96, num_samples=n, pad_multiple=pad, seed=3)
        )
        for n, pad in ((200, 1), (60, 4), (200, 8))
    ]
    rows = [[d.plan.members(i).tolist() for i in range(60)] for d in packed]
    assert rows[0] == rows[1] == rows[2] and packed[0].identity == packed[2].identity
    late = build_dataset(items, tokenizer, DatasetOptions(seq_length=96, num_samples=200, seed=3))
    assert [late.plan.members(i).tolist() for i in range(59, 40, -1)] == rows[0][59:40:-1]


@pytest.mark.parametrize("packing, pad_multiple", [(True, 1), (True, 8), (False, 1)])
def test_every_token_says_which_source_it_is_of(files, tokenizer, packing, pad_multiple):
    data = build_dataset(
        files, tokenizer, DatasetOptions(seq_length=96, packing=packing, pad_multiple=pad_multiple)
    )
    assert data.sources == files
    seen = np.zeros(3, dtype=int)
    for index in range(data.rows_per_pass):
        row = data[index]
        for source, letter in enumerate("abc"):
            mine = row["source_ids"] == source
            text = tokenizer.decode(row["labels"][mine & (row["loss_mask"] > 0)])
            assert set(text) & set("abc") <= {letter}
            seen[source] += text.count(letter)
        assert (row["loss_mask"][row["source_ids"] < 0] == 0).all()
    assert seen.tolist() == [30, 10, 20]
    assert "source_ids" not in build_dataset(files[:1], tokenizer, DatasetOptions(seq_length=96))[0]


@pytest.mark.parametrize(
    "item, reason",
    [
        ("cap=0:{a}", "cap must be above 0"),
        ("cap=1.5:{a}", "cap counts conversations; give a whole number"),
        ("epochs=x:{a}", "epochs must be above 0"),
        ("epochs=inf:{a}", "epochs must be above 0"),
        ("0.5,share=1:{a}", "share is given twice"),
        ("0.5,epochs=2:{a}", "beside shares, and both say how many"),
        ("epochs=0.001:{a}", "would give no conversation to an epoch; raise its share"),
    ],
)
def test_settings_of_a_source_that_mean_nothing_are_refused(files, tokenizer, item, reason):
    with pytest.raises(ValueError, match=reason):
        _build([item.format(a=files[0])], tokenizer)


def test_a_cap_on_validation_data_is_refused(files, tokenizer):
    with pytest.raises(ValueError, match="mean nothing here"):
        _build([f"cap=3:{files[0]}"], tokenizer, shuffle=False)


def test_a_file_whose_name_looks_like_a_setting_is_a_file(tmp_path):
    (tmp_path / "cap=3:x.jsonl").write_text("{}")
    (source,) = parse_sources([tmp_path / "cap=3:x.jsonl"])
    assert source.cap is None and source.name.endswith("cap=3:x.jsonl")


def test_a_resume_with_another_mixture_is_named(files, tokenizer):
    plain = _build(files, tokenizer).identity
    capped = _build([f"cap=12:{files[0]}", *files[1:]], tokenizer).identity
    assert "mixture" not in plain
    (change,) = differences(plain, capped)
    assert change.startswith("caps and epochs of --train-data was None, is [[12, None]")
    shared = _build(files, tokenizer, valid_share=0.1).identity
    # Which part it is says nothing beside that.
    assert differences(plain, shared) == ["--valid-share was None, is 0.1"]
    packed = plain | dict(packing=True, pack_granularity=8)
    unpacked = plain | dict(packing=False, pack_granularity=1)
    assert differences(packed, unpacked) == ["packing (--no-packing) was True, is False"]


def _parts(items, tokenizer, share, **options):
    train = _build(items, tokenizer, valid_share=share, **options)
    valid = _build(
        items, tokenizer, valid_share=share, held_out_part=True, shuffle=False, num_samples=None
    )
    texts = [
        [tokenizer.decode(d.conversations[i] & 0xFFFF) for i in range(len(d.conversations))]
        for d in (train, valid)
    ]
    return train, valid, texts


def test_the_held_out_share_is_of_every_source_and_on_one_side_alone(files, tokenizer):
    train, valid, (trained, held) = _parts(files, tokenizer, 0.2)
    assert valid.conversations.sizes() == [6, 2, 4] and train.conversations.sizes() == [24, 8, 16]
    assert not set(trained) & set(held)
    # Neither the seed nor the order of the files decides.
    _, _, again = _parts(files[::-1], tokenizer, 0.2, seed=99)
    assert set(again[1]) == set(held)
    # A larger share holds out more, and all of the smaller one.
    _, _, more = _parts(files, tokenizer, 0.5)
    assert set(held) < set(more[1])


def test_shares_and_caps_of_training_do_not_hinder_its_held_out_part(files, tokenizer):
    items = [f"0.5,cap=4:{files[0]}", f"0.5:{files[1]}"]
    _, valid, _ = _parts(items, tokenizer, 0.2)
    assert valid.conversations.sizes() == [6, 2] and valid.rows_per_pass == 8


def test_copies_and_samples_of_a_row_stay_together(tmp_path):
    """Qwen3's manner makes each turn a sample; none of a held-out row may train."""
    tokenizer = FAMILIES["qwen3"].tokenizer()
    rows = [{"messages": chat(f"q{i}", "x", f"r{i}", "y")} for i in range(10)]
    store = prepare_file(write_jsonl(tmp_path / "a.jsonl", rows + rows), tokenizer)
    out = held_out(store, 0.3)
    assert len(store) == 40 and out.sum() == 12
    by_row = out.reshape(20, 2)
    assert (by_row[:, 0] == by_row[:, 1]).all() and (by_row[:10] == by_row[10:]).all()


def test_a_share_that_cannot_be_held_out_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}] * 5)
    with pytest.raises(ValueError, match="--valid-share 0.5: no source has two different rows"):
        _build([path], tokenizer, valid_share=0.5)
    with pytest.raises(ValueError, match="--valid-share 1.5: expected a share between 0 and 1"):
        _build([path], tokenizer, valid_share=1.5)
