"""Files of any kind to batches of raw rows, in bounded memory and with row numbers."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_dft.data.batches import BATCH_BYTES, BATCH_ROWS, MAX_LINE_BYTES, RowBatch, Unreadable
from megatron_dft.data.conversation import RowError
from megatron_dft.data.csv_rows import read_csv
from megatron_dft.data.json_array import iterate_array
from megatron_dft.data.sources import CSV, PARQUET, Source
from megatron_dft.data.tables import read_datasets, read_parquet


def read_batches(source: Source) -> Iterator[RowBatch]:
    """All rows of a source, in order.

    Raises ValueError, with the file, where a file is empty, truncated or otherwise damaged.
    """
    if source.kind != "files":
        yield from read_datasets(source)
        return
    for index, path in enumerate(source.paths):
        read = _read_json
        if path.endswith(PARQUET):
            read = read_parquet
        elif path.endswith(CSV):
            read = read_csv
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
    """(element number, decoded element, its characters) of a JSON array."""
    for number, (element, size) in enumerate(iterate_array(stream, MAX_LINE_BYTES), 1):
        yield number, element, size


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
