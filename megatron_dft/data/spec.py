"""What decides a row's tokens, as plain data; and how a stored token says that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Bit 31 of a stored token says that it is supervised; ids stay far below it.
SUPERVISED = np.uint32(1 << 31)
ID_MASK = np.uint32((1 << 31) - 1)

REWRITES = ("per-turn", "refuse")


@dataclass(frozen=True)
class EncoderSpec:
    """All that turns a conversation into ids: picklable, hashable, without transformers.

    tokenizer_json is the `tokenizers` library's own serialisation without truncation, padding and
    post-processor; templates maps "default" (and "tool_use") to Jinja source; variables are what
    the template may read besides the messages; date is ISO (YYYY-MM-DD) or None; rewrites is one
    of REWRITES.
    """

    tokenizer_json: str
    templates: Mapping[str, str]
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    rewrites: str = "per-turn"
