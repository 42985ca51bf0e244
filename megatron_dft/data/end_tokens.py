"""Which tokens end the turns that train: what generation has to stop at."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED, EncoderSpec
from megatron_dft.data.store import TokenStore

# Tokens looked at in one go, so that memory does not grow with the data.
_SLICE_TOKENS = 1 << 22
# A template's marks may take in a line break or so behind the end token.
_BEHIND = 3


def end_tokens(stores: Iterable[TokenStore], spec: EncoderSpec) -> tuple[int, ...]:
    """Ids, ascending, of the special tokens that end a trained turn in any of the stores."""
    special = special_ids(spec)
    found: set[int] = set()
    for store in stores:
        for begin in range(0, len(store.tokens), _SLICE_TOKENS):
            stop = min(begin + _SLICE_TOKENS, len(store.tokens))
            borders = store.offsets[(store.offsets > begin) & (store.offsets <= stop)] - begin
            # One token more: whether the turn goes on behind the slice.
            found |= _ends(np.asarray(store.tokens[begin : stop + 1]), borders, special)
    return tuple(sorted(found))


def end_tokens_of_rows(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], spec: EncoderSpec
) -> tuple[int, ...]:
    """The same of (ids, whether they train), as scored_text gives them."""
    special = special_ids(spec)
    found: set[int] = set()
    for ids, trains in rows:
        flagged = ids.astype(np.uint32) | np.where(trains, SUPERVISED, np.uint32(0))
        found |= _ends(flagged, np.array([len(ids)]), special)
    return tuple(sorted(found))


def probe_end_tokens(spec: EncoderSpec) -> tuple[int, ...]:
    """What the template puts behind the turns of a plain conversation, where there is no data."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    encoder = ChatEncoder(spec)
    special, found = special_ids(spec), set()
    for flagged in encoder.encode(encoder.render(parse_row(row, "messages"))):
        found |= _ends(flagged, np.array([len(flagged)]), special)
    return tuple(sorted(found))


def special_ids(spec: EncoderSpec) -> np.ndarray:
    """int64 ids of the tokenizer's special tokens."""
    added = json.loads(spec.tokenizer_json)["added_tokens"]
    return np.array([t["id"] for t in added if t["special"]], dtype=np.int64)


def _ends(flagged: np.ndarray, borders: np.ndarray, special: np.ndarray) -> set[int]:
    """flagged: uint32 tokens; borders: where conversations end in it, at most its length."""
    trains = (flagged & SUPERVISED) != 0
    ends = np.zeros(len(flagged), dtype=bool)
    ends[:-1] = trains[:-1] & ~trains[1:]
    ends[borders - 1] = trains[borders - 1]
    at, found = np.flatnonzero(ends), set()
    for _ in range(_BEHIND):
        ids = (flagged[at] & ID_MASK).astype(np.int64)
        is_special = np.isin(ids, special) & trains[at]
        found |= set(np.unique(ids[is_special]).tolist())
        at = at[~is_special] - 1
        at = at[at >= 0]
    return found
