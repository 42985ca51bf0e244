"""Raw rows on their way to the tokenising workers, and how many of them make a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A longer line is no conversation (16 MiB of text is four million tokens): it is skipped unread.
MAX_LINE_BYTES = 16 * 1024 * 1024
BATCH_BYTES = 512 * 1024
BATCH_ROWS = 1024


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
