"""Rows of a file as (ids, mask) for `retention` and `diagnose`: plain text, or chat answers."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.reading import Reading
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec, load_as_it_is, load_tokenizer

Sequence = tuple[np.ndarray, np.ndarray]


def conversations(
    paths: list[str],
    tokenizer: Any,
    flag: str,
    reading: Reading | None = None,
    workers: int | None = None,
) -> list[Sequence]:
    """Chat rows (any layout that training reads): all tokens, True on those that train.

    Raises ValueError, with file and line, for a row that training would refuse.
    """
    stores = prepare(
        parse_sources(paths, flag),
        encoder_spec(tokenizer),
        PrepareOptions(reading=reading or Reading(), workers=workers),
    )
    rows = []
    for store in stores:
        for begin, end in itertools.pairwise(store.offsets.tolist()):
            flagged = np.asarray(store.tokens[begin:end])
            rows.append(((flagged & ID_MASK).astype(np.int64), (flagged & SUPERVISED) != 0))
    return rows


def _text_rows(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f'{path}:{number}: expected a JSON object with "text"; chat rows belong to '
                    "--task"
                ) from None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: "text" is {type(text).__name__}, not a string')
            yield text


def plain_text(path: Path, tokenizer: Any) -> list[Sequence]:
    """JSON lines with a "text" field: every token but the first is scored."""
    if not path.is_file():
        raise ValueError(f"--text {path} does not exist; give a JSON lines file with text rows")
    rows = []
    for text in _text_rows(path):
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
        mask = np.ones(len(ids), dtype=bool)
        mask[:1] = False
        rows.append((ids, mask))
    return rows


def limit(rows: list[Sequence], tokens: int, seed: int = 0) -> tuple[list[Sequence], bool]:
    """A random choice of rows with about `tokens` scored tokens, and whether any was left out."""
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen: list[Sequence] = []
    total = 0
    for index in order:
        if total >= tokens:
            return chosen, True
        chosen.append(rows[index])
        total += int(rows[index][1].sum())
    return chosen, False


def tokenizer_of(model: Path, chat_template: str | None = None, chat: bool = True) -> Any:
    """The model's tokenizer; with a chat template where `chat`. ValueError if it has none."""
    if chat:
        return load_tokenizer(model, chat_template)
    return load_as_it_is(model)
