"""What decides a row's tokens, as plain data; and what a stored token says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A stored token is one uint32. Bit 31: it is supervised. Bit 30: it ends a supervised turn. Bit 29:
# the chat template wrote it, not the row (the end is written too). The last two are set on
# supervised tokens alone. The id is in the other 29 bits; vocabularies stay far below.
SUPERVISED = np.uint32(1 << 31)
END = np.uint32(1 << 30)
WRITTEN = np.uint32(1 << 29)
ID_MASK = np.uint32((1 << 29) - 1)

# The same in a row's `token_kinds`: (flagged >> KIND_SHIFT) & 3.
KIND_SHIFT = np.uint32(29)
KIND_WRITTEN, KIND_END = 1, 2

REWRITES = ("per-turn", "refuse")
DROPS = ("refuse", "warn")


# What a row is: a conversation; one whose reward is a factor on its loss; one whose reward has a
# sign; or a pair of a preferred and a rejected answer.
ROW_KINDS = ("chat", "weighted", "rewarded", "pairs")


@dataclass(frozen=True)
class RowKind:
    """What rows are. name: one of ROW_KINDS; wrong_reward: what a reward of 0 counts as."""

    name: str = "chat"
    wrong_reward: float = 0.0


@dataclass(frozen=True)
class EncoderSpec:
    """All that turns a conversation into ids: picklable, hashable, without transformers.

    tokenizer_json is the `tokenizers` library's own serialisation without truncation, padding and
    post-processor; templates maps "default" (and "tool_use") to Jinja source; variables are what
    the template may read besides the messages; date is ISO (YYYY-MM-DD) or None; rewrites is one
    of REWRITES, drops one of DROPS.
    """

    tokenizer_json: str
    templates: Mapping[str, str]
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    rewrites: str = "per-turn"
    drops: str = "refuse"
