"""CSV and TSV files: cells as text, whatever they hold, row numbers, and what is refused."""

import csv
import gzip
import io

import pytest

from megatron_dft.data import csv_rows
from megatron_dft.data.batches import Unreadable
from megatron_dft.data.csv_rows import read_csv
from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.reading import Reading
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.fixtures import chatml_tokenizer, decoded, prepare_file

ROWS = [
    {"question": 'He said "1+1",\nand then?', "answer": "72"},
    {"question": "é — 漢字, x", "answer": "NA"},
    {"question": "true", "answer": "  two  "},
]


def text_of(rows, **dialect):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def read(path):
    return [
        (number, row)
        for batch in read_csv(str(path), 0)
        for number, row in zip(batch.numbers, batch.rows, strict=True)
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_cells_are_the_text_that_was_written(tmp_path, name):
    path = tmp_path / name
    content = text_of(ROWS, delimiter="\t" if "tsv" in name else ",")
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else b"\xef\xbb\xbf" + content)
    assert read(path) == list(enumerate(ROWS, 1))


def test_many_rows_come_in_batches_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "BATCH_ROWS", 100)
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(1000)]
    (tmp_path / "a.csv").write_bytes(text_of(rows))
    batches = list(read_csv(str(tmp_path / "a.csv"), 0))
    assert [len(b.rows) for b in batches] == [100] * 10
    assert [r for b in batches for r in b.rows] == rows
    assert sum(b.size for b in batches) == (tmp_path / "a.csv").stat().st_size


def test_a_row_of_another_width_has_its_place(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"q,a\nx,1\nonly\ny,2\na,b,c\nz,3\n1,2,3\n")
    found = read(tmp_path / "a.csv")
    assert [n for n, _ in found] == [1, 2, 3, 4, 5, 6]
    bad = {n: row.reason for n, row in found if isinstance(row, Unreadable)}
    assert bad == {
        2: "it has 1 cells, the header 2",
        4: "it has 3 cells, the header 2",
        6: "it has 3 cells, the header 2",
    }
    assert [row["a"] for _, row in found if isinstance(row, dict)] == ["1", "2", "3"]


def test_weights_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion,weight\nx,1,0.5\ny,2,\nz,3,much\n")
    assert [row["weight"] for _, row in read(tmp_path / "a.csv")] == [0.5, None, "much"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Empty CSV file"),
        (b"prompt,completion\n", "holds no rows"),
        (b"prompt,prompt\nx,y\n", "names the column 'prompt' twice"),
        (b"prompt,completion\nx,\xff\n", "not UTF-8: byte 0xff"),
        (b"pr\xffmpt,completion\nx,y\n", "not UTF-8"),
        (b'prompt,completion\n"x,y\nz,w\n', "it has 1 cells, the header 2"),
        (b"prompt;completion\nx;y\n", "columns [prompt;completion] show no known layout"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare_file(str(tmp_path / "a.csv"), chatml_tokenizer())
    assert said in str(error.value) and "a.csv" in str(error.value)


def test_a_row_larger_than_memory_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "MAX_LINE_BYTES", 1 << 16)
    (tmp_path / "a.csv").write_bytes(b"q,a\nx,1\nx," + b"y" * (1 << 18) + b"\n")
    with pytest.raises(ValueError, match=r"a.csv: .*a row of more than 0 MiB"):
        read(tmp_path / "a.csv")


def test_questions_and_answers_without_a_script(tmp_path):
    """GSM8K's columns, in a CSV, through the chat template and as they stand."""
    (tmp_path / "a.csv").write_bytes(text_of(ROWS))
    tokenizer = chatml_tokenizer()
    sources = parse_sources([str(tmp_path / "a.csv")])
    template = Reading(columns=(("instruction", "question"), ("output", "answer")))
    plain = Reading(columns=(("completion", "answer"), ("prompt", "question")))
    for reading, begin in ((template, "<|im_start|>user\nHe said"), (plain, "He said")):
        (store,) = prepare(sources, encoder_spec(tokenizer), PrepareOptions(reading=reading))
        text, trained = decoded(store, tokenizer)[0]
        assert len(store) == 3 and trained == "72<|im_end|>" and text.startswith(begin)
