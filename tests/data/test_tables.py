"""Rows of Parquet and of compressed files: bad text is named, and bytes bound what is decoded."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dft.data import readers, tables
from megatron_dft.data.batches import Unreadable
from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.readers import read_batches
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.fixtures import chatml_tokenizer

TEXT = b"ab\xffcd"


def _source(path):
    return parse_sources([str(path)], "--train-data")[0]


def _strings(values):
    """A string column of these bytes; pyarrow's own ways in check that they are UTF-8."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def _parquet(path, prompts, **options):
    table = pa.table({"prompt": _strings(prompts), "completion": ["yes"] * len(prompts)})
    pq.write_table(table, path, **options)
    return path


def test_text_that_is_not_utf8_is_named_with_its_file_and_row(tmp_path):
    path = _parquet(tmp_path / "a.parquet", [b"good", TEXT, b"good too"])
    with pytest.raises(ValueError, match=r"a\.parquet:2: .*byte 0xff at 2 of a text"):
        prepare([_source(path)], encoder_spec(chatml_tokenizer()), PrepareOptions())
    (store,) = prepare(
        [_source(path)],
        encoder_spec(chatml_tokenizer()),
        PrepareOptions(errors="skip", max_bad_rows=1),
    )
    assert len(store) == 2


def _decoded(monkeypatch, path):
    """Bytes of each table that is decoded at once."""
    seen, rows_of = [], tables.rows_of

    def spy(table):
        seen.append(table.nbytes)
        return rows_of(table)

    monkeypatch.setattr(tables, "rows_of", spy)
    rows = sum(len(batch.rows) for batch in read_batches(_source(path)))
    return rows, seen


def test_a_small_file_that_unfolds_is_decoded_in_parts(tmp_path, monkeypatch):
    """One text of 100 kB two thousand times is a dictionary entry in the file."""
    path = _parquet(tmp_path / "a.parquet", [b"x" * 100_000] * 2000)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(tables, "BATCH_BYTES", 4 << 20)
    rows, seen = _decoded(monkeypatch, path)
    assert rows == 2000 and max(seen) <= 128 * 101_000
    sizes = [len(batch.rows) for batch in read_batches(_source(path))]
    assert max(sizes) <= 128, "a batch ends where its bytes are enough"


def test_rows_of_a_column_that_may_be_one_value_are_decoded_one_by_one(tmp_path, monkeypatch):
    path = _parquet(tmp_path / "a.parquet", [b"y" * 90_000, *([b"z"] * 300)], use_dictionary=False)
    monkeypatch.setattr(tables, "_DECODED_BYTES", 200_000)
    rows, seen = _decoded(monkeypatch, path)
    assert rows == 301 and max(seen) < 200_000


def test_a_row_over_the_bound_is_refused_and_no_other(tmp_path, monkeypatch):
    path = _parquet(tmp_path / "a.parquet", [b"a", b"b" * 5000, b"c"])
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 4096)
    (batch,) = read_batches(_source(path))
    assert [isinstance(row, Unreadable) for row in batch.rows] == [False, True, False]


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_a_compressed_file_is_decoded_in_batches_of_bytes(tmp_path, monkeypatch, array):
    rows = [{"prompt": "p" * 10_000, "completion": "c"} for _ in range(400)]
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert path.stat().st_size < 1 << 16
    monkeypatch.setattr(readers, "BATCH_BYTES", 100_000)
    sizes = [len(batch.rows) for batch in read_batches(_source(path))]
    assert sum(sizes) == 400 and max(sizes) <= 11
