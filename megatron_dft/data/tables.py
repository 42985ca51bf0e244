"""Rows of Parquet files and of `datasets`, in bounded memory and without the nulls they fill in.

Arrow gives every row of a column the same fields. So a tool's argument that one row has is null in
all the others, and would be trained as such: nulls inside nested values are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_dft.data.batches import BATCH_BYTES, BATCH_ROWS, MAX_LINE_BYTES, RowBatch, Unreadable
from megatron_dft.data.sources import Source

# Decoded at once at most, whatever the file's compression and dictionaries unfold to.
_DECODED_BYTES = 1 << 30
_MOST_ROWS = 128


def read_parquet(path: str, index: int) -> Iterator[RowBatch]:
    """Raises ValueError, with the file, where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        total, number = max(file.metadata.num_rows, 1), 0
        size = os.path.getsize(path)
        for batch in _batches(file.iter_batches(batch_size=_rows_at_once(file.metadata)), index):
            batch.size = size * len(batch.rows) // total
            number += len(batch.rows)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file: {first_line(error)}") from None


def read_datasets(source: Source) -> Iterator[RowBatch]:
    data = open_dataset(source)
    if len(data) == 0:
        raise ValueError(f"{source.name}: the data set holds no rows")
    tables = data.with_format("arrow").iter(batch_size=_MOST_ROWS)
    for batch in _batches(tables, 0):
        batch.size = len(batch.rows)
        yield batch


def _rows_at_once(metadata: Any) -> int:
    """Rows whose every value may be as large as the largest column chunk."""
    largest = 1
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in range(row_group.num_columns):
            largest = max(largest, row_group.column(column).total_uncompressed_size)
    return max(1, min(_MOST_ROWS, _DECODED_BYTES // largest))


def _batches(tables: Iterable[Any], index: int) -> Iterator[RowBatch]:
    batch, size, number = RowBatch(index, [], []), 0, 0
    for table in tables:
        for row in rows_of(table):
            number += 1
            batch.numbers.append(number)
            batch.rows.append(row)
        size += table.nbytes
        if size >= BATCH_BYTES or len(batch.rows) >= BATCH_ROWS:
            yield batch
            batch, size = RowBatch(index, [], []), 0
    if batch.rows:
        yield batch


def rows_of(table: Any) -> list[Any]:
    """The rows of an Arrow table or record batch: an object each, or why it cannot be read."""
    if table.nbytes <= MAX_LINE_BYTES:
        try:
            return [_cleaned(row) for row in table.to_pylist()]
        except (UnicodeDecodeError, ValueError, OverflowError):
            pass  # one of the rows; which, is seen below
    return [_row(table.slice(number, 1)) for number in range(table.num_rows)]


def _row(table: Any) -> Any:
    """The one row of a table, or why it cannot be read."""
    if table.nbytes > MAX_LINE_BYTES:
        return Unreadable(f"a row of more than {MAX_LINE_BYTES >> 20} MiB")
    try:
        return _cleaned(table.to_pylist()[0])
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        return Unreadable(f"not UTF-8: byte 0x{wrong:02x} at {error.start} of a text")
    except (ValueError, OverflowError) as error:  # dates beyond Python's own, say
        return Unreadable(f"a value that cannot be read: {first_line(error)}")


def _cleaned(row: dict[str, Any]) -> dict[str, Any]:
    """The row as its author wrote it; a column that is null stays, and says so where it is bad."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Without the null fields of nested objects; the content of a message is the row's own."""
    if isinstance(value, dict):
        said = "role" in value or "from" in value
        return {
            k: _without_nulls(v)
            for k, v in value.items()
            if v is not None or (said and k in ("content", "value"))
        }
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def open_dataset(source: Source) -> Any:
    """A saved or hub data set through the `datasets` library, memory-mapped.

    Raises ValueError where it cannot be loaded or a split must be named.
    """
    import datasets

    name, _, split = source.name.partition("@") if source.kind == "hub" else (source.name, "", "")
    try:
        if source.kind == "hub":
            return datasets.load_dataset(name, split=split or "train")
        data = datasets.load_from_disk(name)
    except Exception as error:  # the hub client raises a zoo of types
        raise ValueError(
            f"data set {source.name!r} cannot be loaded: {first_line(error)}; without network "
            "give a file, or a directory that `datasets` saved"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise ValueError(
                f"data set {source.name!r} has the splits {sorted(data)} and no 'train'; name one "
                f"split's directory, {source.name}/<split>"
            )
        return data["train"]
    return data


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
