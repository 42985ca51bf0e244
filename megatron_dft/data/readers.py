"""Files of any kind to batches of raw rows, in bounded memory and with row numbers."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_dft.data.conversation import RowError
from megatron_dft.data.json_array import iterate_array
from megatron_dft.data.sources import PARQUET, Source

# A longer line is no conversation (16 MiB of text is four million tokens): it is skipped unread.
MAX_LINE_BYTES = 16 * 1024 * 1024
BATCH_BYTES = 512 * 1024
BATCH_ROWS = 1024

Progress = Callable[[int], None]


@dataclass
class Unreadable:
    """Stands for a row that was not even read, with the reason."""

    reason: str


@dataclass
class RowBatch:
    """Raw rows of one file. rows: bytes (a JSON line), Unreadable, or a decoded object.

    numbers: each row's line, element or row number, 1-based; file: index among the source's files;
    size: bytes of the file (as stored, maybe compressed) that were read for it.
    """

    file: int
    numbers: list[int]
    rows: list[Any]
    size: int = 0


def read_batches(source: Source) -> Iterator[RowBatch]:
    """All rows of a source, in order.

    Raises ValueError, with the file, where a file is empty, truncated or otherwise damaged.
    """
    if source.kind != "files":
        yield from _read_datasets(source)
        return
    for index, path in enumerate(source.paths):
        read = _read_parquet if path.endswith(PARQUET) else _read_json
        rows = 0
        for batch in read(path, index):
            rows += len(batch.rows)
            yield batch
        if rows == 0:
            raise ValueError(f"{path}: the file holds no rows")


def _read_json(path: str, index: int) -> Iterator[RowBatch]:
    """JSON lines, or one JSON array (told by its first character)."""
    with open(path, "rb") as raw:
        row = 0
        try:
            stream = _decompressed(raw, path)
            head = stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
            rows = _array_rows(stream) if head.startswith(b"[") else _line_rows(stream)
            batch, size, seen = RowBatch(index, [], []), 0, 0
            for row, value, length in rows:
                batch.numbers.append(row)
                batch.rows.append(value)
                size += length
                if size >= BATCH_BYTES or len(batch.rows) >= BATCH_ROWS:
                    batch.size, seen = raw.tell() - seen, raw.tell()
                    yield batch
                    batch, size = RowBatch(index, [], []), 0
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{row + 1}: the compressed file is truncated or damaged: {error}"
            ) from None
        except RowError as error:
            raise ValueError(f"{path}: element {row + 1} of the array: {error}") from None
        if batch.rows:
            batch.size = raw.tell() - seen
            yield batch


def _line_rows(stream: Any) -> Iterator[tuple[int, Any, int]]:
    """(line number, line, bytes) of every line that is not blank."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _skip_line(stream)
            yield number, Unreadable(f"a line of more than {MAX_LINE_BYTES >> 20} MiB"), 0
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line, len(line)


def _array_rows(stream: Any) -> Iterator[tuple[int, Any, int]]:
    """(element number, decoded element, its share of a batch) of a JSON array."""
    share = BATCH_BYTES // BATCH_ROWS
    for number, element in enumerate(iterate_array(stream, MAX_LINE_BYTES), 1):
        yield number, element, share


def _skip_line(stream: Any) -> None:
    while (part := stream.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _decompressed(raw: BinaryIO, path: str) -> Any:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), buffer_size=1 << 16)
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), buffer_size=1 << 20)
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames; unlike zstandard's own reader it notices a truncated file."""

    # 2 KiB in can be 64 MiB out at the very worst, which bounds the memory.
    _CHUNK = 2048

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._zstandard = zstandard
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._decompress():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> bool:
        leftover = b""
        if self._frame is not None and self._frame.eof:
            leftover, self._frame = self._frame.unused_data, None
        data = leftover or self._raw.read(self._CHUNK)
        if not data:
            if self._frame is not None:
                raise EOFError("the last zstd frame has no end")
            return False
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        return True


def _read_parquet(path: str, index: int) -> Iterator[RowBatch]:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        total, number = max(file.metadata.num_rows, 1), 0
        size = os.path.getsize(path)
        for table in file.iter_batches(batch_size=BATCH_ROWS):
            rows = table.to_pylist()
            numbers = list(range(number + 1, number + 1 + len(rows)))
            number += len(rows)
            yield RowBatch(index, numbers, rows, size * len(rows) // total)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file: {_first_line(error)}") from None


def _read_datasets(source: Source) -> Iterator[RowBatch]:
    data = open_dataset(source)
    if len(data) == 0:
        raise ValueError(f"{source.name}: the data set holds no rows")
    number = 0
    for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        rows = table.to_pylist()
        yield RowBatch(0, list(range(number + 1, number + 1 + len(rows))), rows, len(rows))
        number += len(rows)


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
            f"data set {source.name!r} cannot be loaded: {_first_line(error)}; without network "
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
