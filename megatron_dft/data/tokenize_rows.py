"""A batch of raw rows to a block of tokenised conversations; what each worker runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dft.data.batches import RowBatch, Unreadable
from megatron_dft.data.chat_mask import Rendered
from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.encode import ChatEncoder, Encoded
from megatron_dft.data.reading import Reading
from megatron_dft.data.row_values import shown
from megatron_dft.data.schema import NothingToTrain
from megatron_dft.data.spec import SUPERVISED
from megatron_dft.data.store import Block

# Texts given to the tokenizer at once: enough to keep its threads busy, small in memory.
_ENCODE_BATCH = 256


# In a store's counts: how many rows were bad for a reason, its numbers and quotations left out.
REASON = "bad_rows: "
# Likewise of rows that train, for what is said of them once.
NOTE = "note: "
ZERO_WEIGHT = "rows of weight 0"
_MOST_NOTES = 50
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


def tokenize_batch(batch: RowBatch, encoder: ChatEncoder, reading: Reading) -> Result:
    """Tokenises a batch; rows that cannot be trained on come back in `bad`, in order."""
    bad: list[BadRow] = []
    counts = {"rows": len(batch.rows), "per_turn_rows": 0}
    with encoder.renderer.batch():
        rendered, numbers = _rendered(batch, encoder, reading, bad, counts)
    pieces: list[Encoded] = []
    for start in range(0, len(rendered), _ENCODE_BATCH):
        pieces.extend(encoder.encode_weighted(rendered[start : start + _ENCODE_BATCH]))
    kept, kept_numbers = [], []
    size = reading.size
    for start in range(0, len(pieces), size):
        group, number = pieces[start : start + size], numbers[start]
        reason = _nothing_in(group)
        if reason is None:
            kept += group
            kept_numbers += [number] * size
        else:
            bad.append(BadRow(batch.file, number, reason))
    bad.sort(key=lambda b: b.number)
    counts["bad_rows"] = len(bad)
    for row in bad:
        _count(counts, REASON + reason_kind(row.reason))
    return Result(_block(batch.file, kept, kept_numbers, counts), bad)


def _rendered(
    batch: RowBatch,
    encoder: ChatEncoder,
    reading: Reading,
    bad: list[BadRow],
    counts: dict[str, int],
) -> tuple[list[Rendered], list[int]]:
    """The texts of a batch and the row of each; adds to `bad` and `counts`."""
    rendered: list[Rendered] = []
    numbers: list[int] = []
    for number, raw in zip(batch.numbers, batch.rows, strict=True):
        try:
            conversations, texts = _texts(decode_row(raw), reading, encoder)
        except NothingToTrain:
            _count(counts, ZERO_WEIGHT)
            continue
        except RowError as error:
            bad.append(BadRow(batch.file, number, str(error)))
            continue
        except RecursionError:
            bad.append(BadRow(batch.file, number, "its values are nested too deep"))
            continue
        except MemoryError:  # between two renderings, which have a word of their own for it
            bad.append(BadRow(batch.file, number, "it takes too much memory"))
            continue
        counts["per_turn_rows"] += len(texts) > len(conversations)
        for conversation in conversations[:1]:  # what is said of one side is true of the other
            if conversation.notes or conversation.unread:
                _count_notes(counts, conversation, encoder)
        rendered.extend(texts)
        numbers.extend([number] * len(texts))
    return rendered, numbers


def _texts(
    row: Any, reading: Reading, encoder: ChatEncoder
) -> tuple[list[Conversation], list[Rendered]]:
    """A row's conversations, two of a pair, and the texts to train on; RowError as they raise."""
    conversations, texts = reading.parse_all(row), []
    for conversation in conversations:
        rendered = encoder.render(conversation)
        if len(rendered) > 1 and reading.size > 1:
            raise RowError(
                "the chat template rewrites an earlier turn when a later one follows, and an "
                "answer of a pair is one text; keep one turn in it"
            )
        texts += rendered
    return conversations, texts


def _nothing_in(group: Sequence[Encoded]) -> str | None:
    """Why a conversation, or both of a pair, teach nothing; None where they do."""
    for piece in group:
        # The first token is never predicted, so one token alone has nothing to learn from.
        if len(piece.flagged) >= 2 and piece.flagged[-1] & SUPERVISED:
            continue  # as nearly always: what lies behind the last one is cut
        if not bool((piece.flagged[1:] & SUPERVISED).any()):
            return "its assistant turns hold no token"
    if len(group) == 2 and np.array_equal(group[0].flagged, group[1].flagged):
        return "chosen and rejected are the same"
    return None


def _block(file: int, kept: list[Encoded], numbers: list[int], counts: dict[str, int]) -> Block:
    tokens = np.concatenate([np.empty(0, dtype=np.uint32), *(k.flagged for k in kept)])
    counts["supervised_tokens"] = int(np.count_nonzero(tokens & SUPERVISED))
    weights = None
    if any(k.weights is not None for k in kept):
        weights = np.concatenate(
            [np.zeros(len(k.flagged), np.float32) if k.weights is None else k.weights for k in kept]
        )
    return Block(
        tokens=tokens,
        lengths=np.array([len(k.flagged) for k in kept], dtype=np.int64),
        rows=np.array(numbers, dtype=np.int64),
        files=np.full(len(kept), file, dtype=np.int32),
        counts=counts,
        weights=weights,
    )


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _count_notes(counts: dict[str, int], conversation: Conversation, encoder: ChatEncoder) -> None:
    """Counts the rows of each note, a bounded number of different ones."""
    template = encoder.renderer.template
    unread = [f"key {shown(k)} of messages is not read" for k in conversation.unread
              if not template.mentions(k)]  # fmt: skip
    for note in (*conversation.notes, *unread):
        known = NOTE + note in counts or sum(k.startswith(NOTE) for k in counts) < _MOST_NOTES
        _count(counts, NOTE + note if known else NOTE + "other keys and columns are not read")


def decode_row(raw: Any) -> Any:
    """A JSON line to its object; anything already decoded is given back.

    Raises RowError for what is not UTF-8, not JSON, or holds NaN or Infinity, which JSON forbids.
    """
    if isinstance(raw, Unreadable):
        raise RowError(raw.reason)
    if not isinstance(raw, bytes):
        return raw
    try:
        return _DECODER.decode(raw.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RowError("JSON nested too deep") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise error if isinstance(error, RowError) else RowError(f"not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise RowError(f"it holds {name}, which is not JSON")


# json.loads would build one for every row.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def reason_kind(reason: str) -> str:
    """A reason without what is one row's own."""
    return _SPECIFIC.sub("…", reason)


def describe(paths: Sequence[str], bad: BadRow) -> str:
    """file:line: reason."""
    return f"{paths[bad.file]}:{bad.number}: {bad.reason}"
