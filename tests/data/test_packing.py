"""Packing: nothing lost, doubled or overfull, tight, and the same whenever it is asked again."""

import os
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dft.data import packing
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.order import EpochOrder, permutation
from megatron_dft.data.row_plan import RowPlan
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(50, 80), st.integers(1, 4), st.integers(0, 3))
def test_packing_loses_and_doubles_nothing_and_never_overflows(lengths, capacity, rows, seed):
    sizes = np.array(lengths)
    order = permutation(len(sizes), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_ROWS", rows)
        packs = packing.pack(order, sizes, capacity, (seed, 2, 0))
        again = packing.pack(order, sizes, capacity, (seed, 2, 0))
    assert sorted(packs.members.tolist()) == list(range(len(sizes)))
    loads = [sizes[packs.row(r)].sum() for r in range(len(packs))]
    assert max(loads) <= capacity and min(loads) > 0
    assert np.array_equal(packs.members, again.members)
    assert np.array_equal(packs.starts, again.starts)


def test_each_item_goes_where_it_leaves_the_least_room():
    # 6 opens a row, 5 opens another, 4 fills the first exactly, 3 and 2 fill the second.
    packs = packing.pack(np.arange(5), np.array([2, 4, 6, 3, 5]), 10, None)
    assert [packs.row(r).tolist() for r in range(len(packs))] == [[0, 3, 4], [1, 2]]


def test_windows_cut_the_order_and_not_the_conversations(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_ROWS", 2)
    packs = packing.pack(np.arange(8), np.full(8, 5), 10, None)
    assert [packs.row(r).tolist() for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_log_normal_lengths_fill_98_percent_and_more():
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.0, 40_000).astype(np.int64) + 1
    lengths = lengths[lengths <= 4096]
    plan = RowPlan(
        EpochOrder([len(lengths)], None, 1), lengths, seq_length=4096, packing=True,
        granularity=8, shuffle=True,
        seed=1, num_samples=None,
    )  # fmt: skip
    assert plan.efficiency() >= 0.99


def _plan(lengths, cache, **options):
    order = EpochOrder([len(lengths)], None, options.get("seed", 1))
    options = (
        dict(seq_length=100, granularity=1, packing=True, shuffle=True, seed=1, num_samples=40)
        | options
    )
    return RowPlan(order, lengths, cache=cache, cache_key="k", **options)


@pytest.fixture
def large(monkeypatch):
    """Fifty conversations are many."""
    monkeypatch.setattr("megatron_dft.data.row_plan._SMALL", 5)


def test_a_small_set_may_come_thousands_of_times(tmp_path):
    """No file an epoch: a run has about a thousand descriptors."""
    plan = _plan(np.full(6, 30), tmp_path, num_samples=4000)
    assert plan.epochs() == 2000 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("large")
def test_more_epochs_than_files_may_be_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(opened + 300, hard), hard))
    try:
        plan, again = (_plan(np.full(6, 30), tmp_path, num_samples=800) for _ in range(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert plan.epochs() == 400 and len(list(tmp_path.iterdir())) == 400
    assert [again.members(i).tolist() for i in (0, 799)] == [
        plan.members(i).tolist() for i in (0, 799)
    ]


@pytest.mark.usefixtures("large")
def test_packs_are_cached_and_the_cache_changes_nothing(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    plain, stored = _plan(lengths, None), _plan(lengths, tmp_path)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert files and all(f.name.endswith(".packs") for f in files)
    monkeypatch.setattr("megatron_dft.data.row_plan.pack", None)
    cached = _plan(lengths, tmp_path)
    for i in range(40):
        assert plain.members(i).tolist() == stored.members(i).tolist() == cached.members(i).tolist()
    monkeypatch.setattr("megatron_dft.data.row_plan.pack", packing.pack)
    other = _plan(lengths, tmp_path, seed=2)
    assert [other.members(i).tolist() for i in range(40)] != [
        plain.members(i).tolist() for i in range(40)
    ]


@pytest.mark.usefixtures("large")
def test_a_cut_packing_cache_is_refused(tmp_path):
    lengths = np.full(10, 30)
    _plan(lengths, tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged; delete it"):
        _plan(lengths, tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _rows(count):
    return [
        {"messages": chat(f"q {i}?", f"answer {i} " + "x" * (i * 7 % 31), *["u", "v"] * (i % 3))}
        for i in range(count)
    ]


@pytest.mark.parametrize("pad_multiple", [1, 4])
def test_packed_rows_hold_each_conversation_whole_and_alone(tmp_path, tokenizer, pad_multiple):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(30))
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=128, pad_multiple=pad_multiple)
    )
    alone = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=128, packing=False, shuffle=False)
    )
    seen = []
    for i in range(len(data)):
        row, members = data[i], data.plan.members(i)
        seen += members.tolist()
        borders = row["cu_seqlens"]
        assert borders.dtype == torch.int32 and borders[0] == 0 and borders[-1] == 128
        assert row["max_seqlen"].dtype == torch.int32 and row["max_seqlen"].dim() == 0
        inner = borders[: int((borders == 128).nonzero()[0]) + 1]
        assert (inner.diff() > 0).all() and (borders % pad_multiple == 0).all()
        assert row["max_seqlen"] == inner.diff().max()
        assert len(inner) - 1 in (len(members), len(members) + 1)
        for m, begin, end in zip(members, inner, inner[1:], strict=False):
            whole, size = alone[int(m)], len(data.conversations[int(m)]) - 1
            assert 0 <= end - begin - size < pad_multiple
            for key in ("tokens", "labels", "loss_mask"):
                assert torch.equal(row[key][begin : begin + size], whole[key][:size])
            assert (row["loss_mask"][begin + size : end] == 0).all()
            assert row["position_ids"][begin:end].tolist() == list(range(end - begin))
        assert (row["loss_mask"][inner[len(members)] :] == 0).all()
        assert ("cu_seqlens_padded" in row) == (pad_multiple > 1)
    assert sorted(seen) == list(range(30))
    assert len({len(data[i]["cu_seqlens"]) for i in range(len(data))}) == 1


def test_context_parallel_sizes_up_to_four_share_the_rows(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(60))

    def members(pad_multiple):
        data = build_dataset(
            [path], tokenizer, DatasetOptions(seq_length=144, pad_multiple=pad_multiple)
        )
        return [data.plan.members(i).tolist() for i in range(len(data))]

    assert members(1) == members(4) == members(8) != members(16)


def test_packed_validation_is_one_pass_with_rows_that_do_not_count(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(9))
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=128, shuffle=False, batch_multiple=3)
    )
    members = [data.plan.members(i).tolist() for i in range(len(data))]
    assert len(data) == 6 and sorted(sum(members, [])) == list(range(9)) and members[-1] == []
    assert data[len(data) - 1]["loss_mask"].sum() == 0
    assert data[len(data) - 1]["cu_seqlens"].tolist()[:2] == [0, 128]


def test_megatrons_batch_code_reads_packed_rows(tmp_path, tokenizer):
    from megatron.core.utils import flatten_batch_for_packed_sequences
    from torch.utils.data import default_collate

    path = write_jsonl(tmp_path / "a.jsonl", _rows(30))
    data = build_dataset([path], tokenizer, DatasetOptions(seq_length=128, pad_multiple=4))
    rows = [data[0], data[1], data[2]]
    batch = flatten_batch_for_packed_sequences(default_collate(rows))
    borders = [0]
    for i, row in enumerate(rows):
        inner = [b for b in row["cu_seqlens"].tolist()[1:] if b < 128] + [128]
        borders += [i * 128 + b for b in inner]
    assert batch["cu_seqlens"].tolist() == batch["cu_seqlens_padded"].tolist() == [borders]
    assert batch["max_seqlen"].item() == max(int(r["max_seqlen"]) for r in rows)
    assert batch["tokens"].shape == batch["labels"].shape == (1, 3 * 128)
    assert torch.equal(batch["tokens"][0, 128:256], rows[1]["tokens"])
