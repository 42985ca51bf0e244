"""A batch of raw rows to a block of tokenised conversations; what each worker runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dft.data.chat_mask import Rendered
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.readers import RowBatch, Unreadable
from megatron_dft.data.schema import RowError, parse_row
from megatron_dft.data.spec import SUPERVISED
from megatron_dft.data.store import Block

# Texts given to the tokenizer at once: enough to keep its threads busy, small in memory.
_ENCODE_BATCH = 256


# In a store's counts: how many rows were bad for a reason, its numbers and quotations left out.
REASON = "bad_rows: "
_SPECIFIC = re.compile(r"'[^']*'|\d+|\[[^]]*\]|U\+[0-9A-F]+|0x[0-9a-f]+")


@dataclass
class BadRow:
    file: int
    number: int
    reason: str


@dataclass
class Result:
    block: Block
    bad: list[BadRow] = field(default_factory=list)


def tokenize_batch(batch: RowBatch, encoder: ChatEncoder, data_format: str | None) -> Result:
    """Tokenises a batch; rows that cannot be trained on come back in `bad`, in order.

    data_format None recognises each row by its columns.
    """
    rendered: list[Rendered] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    counts = {"rows": len(batch.rows), "per_turn_rows": 0}
    for number, raw in zip(batch.numbers, batch.rows, strict=True):
        try:
            row = decode_row(raw)
            texts = encoder.render(parse_row(row, data_format))
        except RowError as error:
            bad.append(BadRow(batch.file, number, str(error)))
            continue
        counts["per_turn_rows"] += len(texts) > 1
        rendered.extend(texts)
        numbers.extend([number] * len(texts))
    pieces: list[np.ndarray] = []
    for start in range(0, len(rendered), _ENCODE_BATCH):
        pieces.extend(encoder.encode(rendered[start : start + _ENCODE_BATCH]))
    kept, kept_numbers = [], []
    for number, piece in zip(numbers, pieces, strict=True):
        # The first token is never predicted, so one token alone has nothing to learn from.
        if len(piece) >= 2 and bool((piece[1:] & SUPERVISED).any()):
            kept.append(piece)
            kept_numbers.append(number)
        else:
            bad.append(BadRow(batch.file, number, "its assistant turns hold no token"))
    bad.sort(key=lambda b: b.number)
    tokens = np.concatenate([np.empty(0, dtype=np.uint32), *kept])
    counts["bad_rows"] = len(bad)
    for row in bad:
        kind = REASON + _SPECIFIC.sub("…", row.reason)
        counts[kind] = counts.get(kind, 0) + 1
    counts["supervised_tokens"] = int(np.count_nonzero(tokens & SUPERVISED))
    block = Block(
        tokens=tokens,
        lengths=np.array([len(k) for k in kept], dtype=np.int64),
        rows=np.array(kept_numbers, dtype=np.int64),
        files=np.full(len(kept), batch.file, dtype=np.int32),
        counts=counts,
    )
    return Result(block, bad)


def decode_row(raw: Any) -> Any:
    """A JSON line to its object; anything already decoded is given back.

    Raises RowError for what is not UTF-8, not JSON, or holds NaN or Infinity, which JSON forbids.
    """
    if isinstance(raw, Unreadable):
        raise RowError(raw.reason)
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.rstrip().decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RowError("JSON nested too deep") from None


def _refuse_constant(name: str) -> Any:
    raise RowError(f"it holds {name}, which is not JSON")


def describe(paths: Sequence[str], bad: BadRow) -> str:
    """file:line: reason."""
    return f"{paths[bad.file]}:{bad.number}: {bad.reason}"
