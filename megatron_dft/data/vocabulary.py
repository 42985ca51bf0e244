"""Every stored id is a row of the model's embedding, or the run stops before its first step.

A tokenizer with tokens that the model was never given (an added pad or chat token, the tokenizer of
another release) is a common fault. A sharded embedding answers such an id with zeros, silently.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dft.data.spec import ID_MASK, EncoderSpec
from megatron_dft.data.store import TokenStore

_SLICE = 1 << 22


def check_ids(stores: Sequence[TokenStore], vocab_size: int, spec: EncoderSpec) -> None:
    """Raises ValueError naming the first token from `vocab_size` on, the row that holds it, and
    what to do. vocab_size: rows of the model's embedding without Megatron's padding."""
    for store in stores:
        if store.meta["largest_id"] < vocab_size:
            continue
        at = _first_from(store.tokens, vocab_size)
        conversation = int(np.searchsorted(store.offsets, at, side="right")) - 1
        token = int(store.tokens[at] & ID_MASK)
        raise ValueError(
            f"{store.where(conversation)}: it holds token {token} ({_name(token, spec)}), and the "
            f"model's embedding has {vocab_size} rows, 0 to {vocab_size - 1}; give the tokenizer "
            "and chat template that belong to the model, or add the row to the checkpoint (resize "
            "its embedding)"
        )


def vocab_size_of(model: str | os.PathLike[str]) -> int | None:
    """`vocab_size` of a model directory's config.json; None where it says none.

    Whoever has the model itself knows better; this serves where there is only its directory.
    """
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        found = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _first_from(tokens: np.ndarray, vocab_size: int) -> int:
    for begin in range(0, len(tokens), _SLICE):
        wrong = (tokens[begin : begin + _SLICE] & ID_MASK) >= vocab_size
        if wrong.any():
            return begin + int(np.argmax(wrong))
    raise AssertionError("largest_id is of another store")


def _name(token: int, spec: EncoderSpec) -> str:
    from tokenizers import Tokenizer

    return repr(Tokenizer.from_str(spec.tokenizer_json).id_to_token(token))
