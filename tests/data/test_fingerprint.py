"""Resuming with other data is refused with every difference named, and with the same data exact."""

import pytest

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.fingerprint import FILE_NAME, check_resume, record
from megatron_dft.data.options import DatasetOptions
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _rows(count):
    return [{"messages": chat(f"q {i}", f"answer {i} " + "x" * (i % 9))} for i in range(count)]


def _build(path, tokenizer, **options):
    options = {"seq_length": 64, "seed": 5} | options
    return build_dataset([path], tokenizer, DatasetOptions(**options))


def _changed(tmp_path, path, tokenizer, **options):
    with pytest.raises(ValueError) as caught:
        check_resume(tmp_path, _build(path, tokenizer, **options).identity, False)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or go on with --allow-data-change")
    return str(caught.value)


def test_each_change_is_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(20))
    record(tmp_path, _build(path, tokenizer).identity)
    assert "--seed was 5, is 6;" in _changed(tmp_path, path, tokenizer, seed=6)
    assert "--seq-length was 64, is 72;" in _changed(tmp_path, path, tokenizer, seq_length=72)
    assert "packing (--no-packing) was True, is False" in _changed(
        tmp_path, path, tokenizer, packing=False
    )
    assert "--overlong was 'refuse', is 'drop'" in _changed(
        tmp_path, path, tokenizer, overlong="drop"
    )
    other = write_jsonl(tmp_path / "b.jsonl", _rows(21))
    assert "the content of the data was " in _changed(tmp_path, other, tokenizer)
    templated, wider = chatml_tokenizer(), chatml_tokenizer()
    templated.chat_template += "{# changed #}"
    assert "the chat template was " in _changed(tmp_path, path, templated)
    wider.add_tokens(["zzz"])
    both = _changed(tmp_path, path, wider, seed=6)
    assert "the tokenizer was " in both and "--seed was 5, is 6" in both


def test_the_number_and_the_weights_of_sources_count(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", _rows(20))
    b = write_jsonl(tmp_path / "b.jsonl", _rows(9))
    record(tmp_path, _build(a, tokenizer).identity)
    two = build_dataset([f"1:{a}", f"2:{b}"], tokenizer, DatasetOptions(seq_length=64, seed=5))
    with pytest.raises(ValueError, match=r"had 1 items, has 2"):
        check_resume(tmp_path, two.identity, False)
    record(tmp_path, two.identity)
    three = build_dataset([f"1:{a}", f"3:{b}"], tokenizer, DatasetOptions(seq_length=64, seed=5))
    with pytest.raises(ValueError, match=r"weights of --train-data was \[1.0, 2.0\], is \[1.0, 3"):
        check_resume(tmp_path, three.identity, False)


def test_what_does_not_matter_is_no_change(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(20))
    record(tmp_path, _build(path, tokenizer).identity)
    moved = write_jsonl(tmp_path / "moved.jsonl", _rows(20))
    for data in (
        _build(moved, tokenizer),
        _build(path, tokenizer, num_samples=500, pad_multiple=4),
        _build(path, tokenizer, cache_dir=tmp_path / "c"),
        _build(path, tokenizer, errors="skip"),
    ):
        assert check_resume(tmp_path, data.identity, False) == []


def test_a_change_can_be_allowed_and_is_told(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", _rows(20))
    record(tmp_path, _build(path, tokenizer).identity)
    changes = check_resume(tmp_path, _build(path, tokenizer, seed=6).identity, True)
    assert changes == ["--seed was 5, is 6"]


def test_no_record_is_no_claim_and_a_broken_one_is_named(tmp_path, tokenizer):
    data = _build(write_jsonl(tmp_path / "a.jsonl", _rows(3)), tokenizer)
    assert check_resume(tmp_path, data.identity, False) == []
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        check_resume(tmp_path, data.identity, False)


@pytest.mark.parametrize("packing", [True, False])
def test_every_layout_and_every_resume_reads_the_same_rows(tmp_path, tokenizer, packing):
    """Megatron's own sampler over any data-parallel size, from any step on."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    path = write_jsonl(tmp_path / "a.jsonl", _rows(70))
    steps, batch = 12, 8

    def members_of_each_step(replicas, from_step, pad_multiple=1):
        data = _build(
            path, tokenizer, packing=packing, num_samples=steps * batch, pad_multiple=pad_multiple
        )
        walks = [
            iter(
                MegatronPretrainingSampler(
                    len(data), from_step * batch, 2, rank, replicas, drop_last=True
                )
            )
            for rank in range(replicas)
        ]
        seen = []
        for _ in range(from_step, steps):
            # A step is batch / (2 · replicas) micro-batches of every replica.
            micro = [[next(w) for w in walks] for _ in range(batch // (2 * replicas))]
            seen.append([data.plan.members(i).tolist() for m in micro for rows in m for i in rows])
        return seen

    whole = members_of_each_step(1, 0)
    assert len(whole) == steps and len({str(s) for s in whole}) > steps // 2
    for replicas in (2, 4):
        assert members_of_each_step(replicas, 0) == whole
    assert members_of_each_step(1, 0, pad_multiple=4) == whole
    for step in range(1, steps):
        assert members_of_each_step((1, 2, 4)[step % 3], step) == whole[step:]
