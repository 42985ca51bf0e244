"""The one form that every layout of rows comes to, and the refusal of a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class RowError(ValueError):
    """A row that cannot be trained on; the message is the reason, without file and line."""


@dataclass
class Conversation:
    """One row. Either `messages` (rendered by the chat template) or `text` (used verbatim).

    messages: dicts with role and content, in order; the content of a message with tool calls may be
    None or absent, as the row has it; trained: indices of the assistant messages that train,
    ascending, never empty; tools: JSON schemas or None; text: (prompt, completion); weights: factor
    on the loss of a trained message (of a text: of index 0) where it is not 1, always above 0;
    calls: some message has tool calls; unread: keys of messages that only the template might read;
    notes: what of this row is counted and said once for all rows.
    """

    messages: list[dict[str, Any]]
    trained: list[int]
    tools: list[Any] | None = None
    text: tuple[str, str] | None = None
    weights: dict[int, float] = field(default_factory=dict)
    calls: bool = False
    unread: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def assistant_turns(self) -> list[int]:
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
