"""Every kind of file gives the same conversations, and damaged ones are refused."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.readers import read_batches
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.fixtures import chat, chatml_tokenizer, decoded, prepare_file, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


ROWS = [
    {"messages": chat(f"q{i} é🙂", f"a{i}\n", *(("more", "b") if i % 2 else ()))} for i in range(40)
]


def _jsonl_bytes(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def _write(kind, directory, rows):
    path = directory / f"data.{kind}"
    raw = _jsonl_bytes(rows)
    if kind == "jsonl":
        path.write_bytes(raw)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(raw))
    elif kind == "jsonl.zst":
        half = len(raw) // 2  # two frames, as appending tools write them
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(raw[:half]) + compress(raw[half:]))
    elif kind in ("json", "json.gz"):
        text = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(text) if kind == "json.gz" else text)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "saved splits":
        train = datasets.Dataset.from_list(rows)
        datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(path)
    elif kind == "directory":
        path.mkdir()
        (path / "a.jsonl").write_bytes(_jsonl_bytes(rows[:15]))
        (path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl_bytes(rows[15:])))
        (path / "notes.txt").write_text("not data")
    return str(path)


KINDS = [
    "json",
    "json.gz",
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "parquet",
    "saved",
    "saved splits",
    "directory",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_conversations(tmp_path, tokenizer, kind):
    path = _write(kind, tmp_path, ROWS)
    store = prepare_file(path, tokenizer, cache_dir=tmp_path / "cache")
    texts = decoded(store, tokenizer)
    assert [t for _, t in texts] == [
        "".join(m["content"] + "<|im_end|>" for m in r["messages"] if m["role"] == "assistant")
        for r in ROWS
    ]
    where = store.where(20)
    assert where == {"directory": f"{path}/b.jsonl.gz:6"}.get(kind, f"{path}:21")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_truncated_file_is_refused_whatever_the_mode(tmp_path, tokenizer, kind):
    rows = [{"messages": chat(f"q{i} {i * 7919 % 1009}", f"a{i * i}")} for i in range(3000)]
    path = _write(kind, tmp_path, rows)
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) - 200)
    for errors in ("strict", "skip"):
        with pytest.raises(ValueError, match="truncated or damaged|not a whole Parquet") as caught:
            prepare_file(path, tokenizer, errors=errors, max_bad_rows=0.5, cache_dir=tmp_path / "c")
        assert str(caught.value).startswith(path) and "\n" not in str(caught.value)
    assert not list((tmp_path / "c" / "tokens").glob("*/meta.json"))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr("megatron_dft.data.json_array._READ_BYTES", chunk)
    rows = [{"a": ["é🙂", 1.5e3, -12, True, None]}, {}, {"b": "]},[{"}, 12345]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
    (batch,) = read_batches(parse_sources([path])[0])
    assert batch.rows == rows and batch.numbers == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text, fault",
    [
        ('[{"a": 1}, {"b": ', "element 2 of the array: not JSON"),
        ('[{"a": 1} {"b": 2}]', "element 2 of the array: a JSON array needs , or ] behind"),
        ('[{"a": 1}, {"b": NaN}]', "element 2 of the array: it holds NaN"),
        ('[{"a": 1}', "element 2 of the array: a JSON array needs"),
        ("[]", "the file holds no rows"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_broken_array_is_refused(tmp_path, text, fault):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(read_batches(parse_sources([tmp_path / "a.json"])[0]))
    assert fault in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/a.json: ")


def test_a_bad_element_of_an_array_is_a_bad_row(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], {"messages": chat("no answer")}, 3]))
    with pytest.raises(ValueError, match="a.json:2: it has no assistant turn"):
        prepare_file(str(path), tokenizer)
    store = prepare_file(str(path), tokenizer, errors="skip", max_bad_rows=2)
    assert len(store) == 1 and store.meta["counts"]["bad_rows"] == 2


def test_what_is_not_compressed_is_named(tmp_path, tokenizer):
    for kind in ("jsonl.gz", "jsonl.zst", "parquet"):
        path = tmp_path / f"data.{kind}"
        path.write_bytes(_jsonl_bytes(ROWS))
        with pytest.raises(ValueError, match=f"data.{kind}"):
            prepare_file(str(path), tokenizer)


def test_bad_rows_of_parquet_are_numbered(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    columns = {"instruction": ["a", "b", "c"], "output": ["x", None, "z"]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=r'a.parquet:2: "output" must be text, but is null'):
        prepare_file(str(path), tokenizer)


def test_batches_stay_small_however_large_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dft.data.readers.BATCH_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    batches = list(read_batches(parse_sources([path])[0]))
    assert len(batches) > 3 and [n for b in batches for n in b.numbers] == list(range(1, 41))
    assert all(sum(map(len, b.rows)) < 1400 for b in batches)
    assert sum(b.size for b in batches) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    "items, fault",
    [
        ([], "--train-data names no data"),
        (["nothere.jsonl"], "'nothere.jsonl' does not exist"),
        (["0:{a}"], "the weight must be above 0"),
        (["0.5:{a}", "{a}"], "has a weight and .* has none"),
        (["{a}.txt"], "unknown kind of file; expected .jsonl"),
        (["{empty}"], "a directory without .jsonl, .parquet or .csv files"),
        (["no/such-hub-name"], "data set 'no/such-hub-name' cannot be loaded: .*without network"),
        (["{splits}"], r"has the splits \['test'\] and no 'train'; name one"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(tmp_path, tokenizer, items, fault):
    a = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "splits")
    names = {"a": a, "empty": tmp_path / "empty", "splits": tmp_path / "splits"}
    with pytest.raises(ValueError, match=fault) as caught:
        sources = parse_sources([i.format(**names) for i in items])
        prepare(sources, encoder_spec(tokenizer), PrepareOptions())
    assert "\n" not in str(caught.value)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    path = write_jsonl(tmp_path / "a:b.jsonl", ROWS)
    (source,) = parse_sources([f"2.5:{path}"])
    assert (source.name, source.weight) == (path, 2.5)
    assert parse_sources([path])[0].weight is None


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.jsonl", "valid.jsonl"),
        ("gsm8k_train.jsonl", "gsm8k_dev.jsonl"),
        ("train/a.jsonl", "eval/a.jsonl"),
        ("training-1.csv", "testing.csv"),
    ],
)
def test_a_directory_of_several_splits_is_refused(tmp_path, train, held_out):
    for name in (train, held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="holds several splits: .*; name the files of one") as e:
        parse_sources([tmp_path])
    assert train in str(e.value) and held_out in str(e.value)
    assert len(parse_sources([tmp_path / train, tmp_path / held_out])) == 2


def test_a_directory_of_one_split_is_taken(tmp_path):
    for name in ("train-1.jsonl", "constrained.jsonl", "contest.jsonl", "validated.jsonl"):
        (tmp_path / name).write_text("{}")
    ((source),) = parse_sources([tmp_path])
    assert len(source.paths) == 4


def test_validation_data_names_its_split(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(tmp_path / "d")
    for item, remedy in ((tmp_path / "d", f"{tmp_path}/d/validation"), ("a/b", "a/b@validation")):
        assert parse_sources([item])
        with pytest.raises(ValueError, match=f"--valid-data .*split.* such as {remedy}"):
            parse_sources([item], "--valid-data")
        assert parse_sources([remedy], "--valid-data")
