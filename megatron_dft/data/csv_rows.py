"""Rows of a CSV file (commas) or TSV file (tabs): its first line names the columns, cells are text.

Quoted cells may hold line breaks. pyarrow reads it in blocks, so that memory stays bounded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from megatron_dft.data.batches import BATCH_BYTES, BATCH_ROWS, MAX_LINE_BYTES, RowBatch, Unreadable
from megatron_dft.data.tables import first_line, rows_of
from megatron_dft.data.training_keys import is_training_key

_MOST_ROWS = 128  # decoded at once


def read_csv(path: str, index: int) -> Iterator[RowBatch]:
    """Rows are numbered from 1, the header and blank lines left out; one with too many or too few
    cells is Unreadable.

    Raises ValueError, with the file, where it cannot be read as a table.
    """
    import pyarrow as pa

    batch, size, seen = RowBatch(index, [], []), 0, 0
    with open(path, "rb") as raw:
        try:
            for number, (row, length) in enumerate(_numbered(path, raw), 1):
                batch.numbers.append(number)
                batch.rows.append(row)
                size += length
                if size >= BATCH_BYTES or len(batch.rows) >= BATCH_ROWS:
                    batch.size, seen = _at(raw) - seen, _at(raw)
                    yield batch
                    batch, size = RowBatch(index, [], []), 0
        except (pa.ArrowException, OSError) as error:
            why = first_line(error)
            if "straddling" in why:
                why = f"a row of more than {MAX_LINE_BYTES >> 20} MiB, or a quote that never ends"
            raise ValueError(f"{path}: not a whole CSV file: {why}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: its first line is not UTF-8: {error}") from None
        if batch.rows:
            batch.size = _at(raw) - seen
            yield batch


def _at(raw: Any) -> int:
    """Bytes of the file that were read; pyarrow closes it at its end."""
    return os.stat(raw.name).st_size if raw.closed else raw.tell()


def _numbered(path: str, raw: Any) -> Iterator[tuple[Any, int]]:
    """(row or Unreadable, its bytes) of every record, in the order of the file."""
    bad: deque[tuple[int, str]] = deque()  # records of another width: number, reason

    def note(record: Any) -> str:
        found, expected = record.actual_columns, record.expected_columns
        bad.append((record.number - 1, f"it has {found} cells, the header {expected}"))
        return "skip"

    number = 1
    for table in _tables(path, raw, note):
        for begin in range(0, table.num_rows, _MOST_ROWS):
            part = table.slice(begin, _MOST_ROWS)
            each = part.nbytes // part.num_rows
            for row in rows_of(part):
                while bad and bad[0][0] == number:
                    yield Unreadable(bad.popleft()[1]), 0
                    number += 1
                yield _numbers_read(row), each
                number += 1
    for _, reason in bad:
        yield Unreadable(reason), 0


def _tables(path: str, raw: Any, note: Any) -> Iterator[Any]:
    """Record batches with text in every column."""
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(
        delimiter="\t" if ".tsv" in path else ",",
        newlines_in_values=True,
        invalid_row_handler=note,
    )
    read = csv.ReadOptions(use_threads=False, block_size=MAX_LINE_BYTES)
    with open(path, "rb") as once:
        quiet = csv.ParseOptions(
            delimiter=parse.delimiter,
            newlines_in_values=True,
            invalid_row_handler=lambda row: "skip",
        )
        convert = csv.ConvertOptions(check_utf8=False)
        names = csv.open_csv(_stream(path, once), read, quiet, convert).schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: its first line names the column {twice!r} twice")
    convert = csv.ConvertOptions(
        check_utf8=False, strings_can_be_null=False, column_types=dict.fromkeys(names, pa.string())
    )
    yield from csv.open_csv(_stream(path, raw), read, parse, convert)


def _stream(path: str, raw: Any) -> Any:
    import pyarrow as pa

    for suffix, name in ((".gz", "gzip"), (".zst", "zstd")):
        if path.endswith(suffix):
            return pa.CompressedInputStream(pa.PythonFile(raw, "r"), name)
    return pa.PythonFile(raw, "r")


def _numbers_read(row: Any) -> Any:
    """A weight is a number; what is none stays text, and the row is refused for it."""
    if not isinstance(row, dict):
        return row
    for name in [n for n in row if is_training_key(n) and "weight" in n.lower()]:
        text = row[name].strip()
        try:
            row[name] = float(text) if text else None
        except ValueError:
            continue
    return row
