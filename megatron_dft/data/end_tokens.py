"""Which tokens end the turns that train: what generation has to stop at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import END, ID_MASK, EncoderSpec
from megatron_dft.data.store import TokenStore

# Tokens looked at in one go, so that memory does not grow with the data.
_SLICE_TOKENS = 1 << 22


def end_tokens(stores: Iterable[TokenStore]) -> tuple[int, ...]:
    """Ids, ascending, of the tokens that end a trained turn in any of the stores."""
    found: set[int] = set()
    for store in stores:
        for begin in range(0, len(store.tokens), _SLICE_TOKENS):
            found |= _ends(np.asarray(store.tokens[begin : begin + _SLICE_TOKENS]))
    return tuple(sorted(found))


def probe_end_tokens(spec: EncoderSpec) -> tuple[int, ...]:
    """What the template puts behind the turns of a plain conversation, where there is no data."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    encoder = ChatEncoder(spec)
    found: set[int] = set()
    for flagged in encoder.encode(encoder.render(parse_row(row, "messages"))):
        found |= _ends(flagged)
    return tuple(sorted(found))


def _ends(flagged: np.ndarray) -> set[int]:
    return set((flagged[(flagged & END) != 0] & ID_MASK).tolist())
