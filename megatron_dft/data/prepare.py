"""Sources to tokenised stores: errors first, cached by content."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dft.data.chat_mask import ChatEncoder, EncoderSpec
from megatron_dft.data.readers import read_batches
from megatron_dft.data.sources import Source, parse_sources
from megatron_dft.data.store import TokenStore
from megatron_dft.data.tokenize_rows import BadRow, describe, tokenize_batch

log = logging.getLogger(__name__)

ERRORS = ("strict", "skip")


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become tokens.

    data_format: one of schema.FORMATS, or None to recognise it; errors: one of ERRORS;
    max_bad_rows: with "skip", how many rows may be bad: a share of all below 1, a count from 1 on;
    cache_dir: where tokenised data is kept, None keeps it in memory; workers: tokenising processes,
    None for one a core.
    """

    data_format: str | None = None
    errors: str = "strict"
    max_bad_rows: float = 0.001
    cache_dir: str | os.PathLike[str] | None = None
    workers: int | None = None
    progress: bool = False


def prepare(
    sources: Sequence[str | os.PathLike[str]] | Sequence[Source],
    spec: EncoderSpec,
    options: PrepareOptions,
    flag: str = "--train-data",
) -> list[TokenStore]:
    """One store for each source, in their order.

    Raises ValueError, one line with file and row, for bad rows (errors "strict"), for more bad rows
    than `max_bad_rows` (errors "skip"), and for files that cannot be read.
    """
    parsed = [s if isinstance(s, Source) else parse_sources([s], flag)[0] for s in sources]
    encoder = ChatEncoder(spec)
    return [_tokenize(source, encoder, options) for source in parsed]


def _tokenize(source: Source, encoder: ChatEncoder, options: PrepareOptions) -> TokenStore:
    paths = list(source.paths) if source.kind == "files" else [source.name]
    blocks, bad = [], []
    for batch in read_batches(source):
        result = tokenize_batch(batch, encoder, options.data_format)
        if result.bad and options.errors == "strict":
            raise bad_row_error(paths, result.bad[0])
        bad.extend(result.bad)
        blocks.append(result.block)
    meta: dict[str, Any] = {"paths": paths, "bad": [describe(paths, b) for b in bad[:100]]}
    store = TokenStore.from_blocks(blocks, meta)
    check_bad_rows(store, source.name, options)
    return store


def bad_row_error(paths: Sequence[str], bad: BadRow) -> ValueError:
    return ValueError(
        f"{describe(paths, bad)}; mend the row, or leave bad rows out with --data-errors skip"
    )


def check_bad_rows(store: TokenStore, name: str, options: PrepareOptions) -> None:
    """Raises ValueError where a store left out more rows than the options allow."""
    bad, rows = store.meta["counts"].get("bad_rows", 0), store.meta["counts"].get("rows", 0)
    if bad and options.errors == "strict":
        raise ValueError(
            f"{store.meta['bad'][0]}; mend the row, or leave bad rows out with --data-errors skip"
        )
    limit = options.max_bad_rows
    allowed = limit * rows if limit < 1 else limit
    if bad > allowed:
        raise ValueError(
            f"{name}: {bad} of {rows} rows are bad, more than --max-bad-rows {limit:g} allows; the "
            f"first is {store.meta['bad'][0]}"
        )
    if len(store) == 0:
        raise ValueError(f"{name}: no row can be trained on")
    if bad:
        log.warning("%s: left out %d of %d rows", name, bad, rows)
        for line in store.meta["bad"][:20]:
            log.warning("left out: %s", line)


def cache_directory(options: PrepareOptions) -> Path | None:
    return None if options.cache_dir is None else Path(options.cache_dir)
