"""Which rows of an item are read, and how a row of it becomes a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dft.data.batches import RowBatch
from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.pairs import parse_pair
from megatron_dft.data.row_values import kind_of, shown
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import RowKind

# What --columns may put a column in the place of.
NAMES = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output",
    "history", "system", "tools", "weight", "reward", "chosen", "rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """data_format: of schema.FORMATS, None recognises it by the columns; columns: (name here, name
    in the row) of --columns; mask_history: the last assistant turn that trains trains alone;
    max_samples: the first so many rows of an item, None for all; rows: what they are.
    """

    data_format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    mask_history: bool = False
    max_samples: int | None = None
    rows: RowKind = RowKind()

    @property
    def size(self) -> int:
        """Conversations of a row that belong together."""
        return 2 if self.rows.name == "pairs" else 1

    def parse_all(self, row: Any) -> list[Conversation]:
        """A decoded row to its conversations, the preferred answer of a pair first; as `parse`."""
        if self.size == 1:
            return [self.parse(row)]
        sides = parse_pair(self._renamed(row) if self.columns else row)
        return [self._masked(side) for side in sides]

    def parse(self, row: Any) -> Conversation:
        """A decoded row to a conversation; RowError with the reason where it is none."""
        row = self._renamed(row) if self.columns else row
        return self._masked(parse_row(row, self.data_format, self.rows))

    def _masked(self, found: Conversation) -> Conversation:
        if self.mask_history:
            found.trained = found.trained[-1:]
            found.weights = {i: w for i, w in found.weights.items() if i in found.trained}
        return found

    def _renamed(self, row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise RowError(f"a row must be a JSON object, not {kind_of(row)}")
        missing = [theirs for _, theirs in self.columns if theirs not in row]
        if missing:
            have = ", ".join(shown(c) for c in sorted(map(str, row))[:12]) or "none"
            raise RowError(f"--columns names {shown(missing[0])}; its columns are {have}")
        taken = {name for pair in self.columns for name in pair}
        kept = {name: value for name, value in row.items() if name not in taken}
        return kept | {ours: row[theirs] for ours, theirs in self.columns}

    def first_rows(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """The batches up to max_samples rows."""
        left = self.max_samples
        for batch in batches:
            if left is not None and len(batch.rows) >= left:
                yield RowBatch(batch.file, batch.numbers[:left], batch.rows[:left], batch.size)
                return
            if left is not None:
                left -= len(batch.rows)
            yield batch

    def identity(self) -> dict[str, Any]:
        """What the tokens of an item depend on; absent where it is not used, as earlier runs have
        recorded it."""
        found: dict[str, Any] = {"format": self.data_format}
        if self.columns:
            found["columns"] = [list(pair) for pair in self.columns]
        if self.mask_history:
            found["mask_history"] = True
        if self.max_samples is not None:
            found["max_samples"] = self.max_samples
        if self.rows != RowKind():
            found["rows"] = asdict(self.rows)
        return found


def parse_columns(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`["prompt=question", "completion=answer"]` to pairs, sorted.

    Raises ValueError for a word without =, a name that no layout has, and one that comes twice.
    """
    pairs: list[tuple[str, str]] = []
    for word in words:
        ours, equals, theirs = word.partition("=")
        if not equals or not theirs:
            raise ValueError(
                f"--columns: expected NAME=COLUMN such as prompt=question, got {word!r}"
            )
        if ours not in NAMES:
            raise ValueError(f"--columns {word}: expected one of {', '.join(NAMES)} before the =")
        if ours in dict(pairs):
            raise ValueError(f"--columns {word}: {ours} is given twice; keep one")
        pairs.append((ours, theirs))
    return tuple(sorted(pairs))
