"""Sources to tokenised stores: errors first, cached by content."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_dft.data.cache import digest, locked, store_parts, writing
from megatron_dft.data.duplicates import Duplicates
from megatron_dft.data.progress import progress_bar
from megatron_dft.data.readers import read_batches
from megatron_dft.data.reading import Reading
from megatron_dft.data.sources import Source
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.store import Block, StoreWriter, TokenStore
from megatron_dft.data.tokenize_rows import NOTE, BadRow, describe, reason_kind
from megatron_dft.data.vocabulary import check_ids
from megatron_dft.data.workers import available_cores, tokenize_in_parallel, tokenize_serially
from megatron_dft.storage import terminal

ERRORS = ("strict", "skip")
# Below this the processes would take longer to start than to tokenise.
_PARALLEL_BYTES = 4 * 1024 * 1024
# Bad rows whose reasons are kept; all are counted.
_BAD_KEPT = 1000
_BAD_SAID = 5


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become tokens.

    reading: which rows are read, and what a row is; errors: one of ERRORS;
    max_bad_rows: with "skip", how many rows may be bad: a share of all below 1, a count from 1 on;
    cache_dir: where tokenised data is kept, None keeps it in memory; workers: tokenising processes,
    None for one a core; progress: this process tells how far it is and which rows are left out;
    vocab_size: rows of the model's embedding, None where no model is at hand.
    """

    reading: Reading = Reading()
    errors: str = "strict"
    max_bad_rows: float = 0.001
    cache_dir: str | os.PathLike[str] | None = None
    workers: int | None = None
    progress: bool = False
    vocab_size: int | None = None


def prepare(
    sources: Sequence[Source], spec: EncoderSpec, options: PrepareOptions
) -> list[TokenStore]:
    """One store for each source, in their order, as `tokenised` gives them; checked.

    Raises ValueError, one line with file and row, for bad rows (errors "strict"), for more bad rows
    than `max_bad_rows` (errors "skip"), for files that cannot be read, and for ids that are no rows
    of the embedding.
    """
    stores = []
    for source in sources:
        store = tokenised(source, spec, options)
        check_bad_rows(store, source.name, options)
        stores.append(store)
    if options.vocab_size is not None:
        check_ids(stores, options.vocab_size, spec)
    return stores


def tokenised(source: Source, spec: EncoderSpec, options: PrepareOptions) -> TokenStore:
    """A source's store, however many bad rows it left out; `meta["parts"]` says what its tokens
    depend on.

    With a cache directory, processes that call this at the same time (ranks, jobs) share the work:
    one tokenises, the others wait for it. Raises ValueError at the first bad row of a source that
    is not in the cache with errors "strict", and for files that cannot be read.
    """
    cache = None if options.cache_dir is None else Path(options.cache_dir)
    parts = store_parts(source, spec, options.reading, cache)
    store = _prepare_one(source, digest(parts), spec, options, cache)
    # The content is the same wherever the files lie now.
    store.meta.update(paths=_names(source), parts=parts)
    return store


def _prepare_one(
    source: Source, key: str, spec: EncoderSpec, options: PrepareOptions, cache: Path | None
) -> TokenStore:
    if cache is None:
        bad: list[BadRow] = []
        copies = Duplicates()
        blocks = list(_blocks(source, spec, options, bad, copies))
        return TokenStore.from_blocks(blocks, _meta(source, key, bad, copies))
    target = cache / "tokens" / key
    if not (target / "meta.json").exists():
        with locked(target):
            if not (target / "meta.json").exists():
                _build(target, source, key, spec, options)
    return TokenStore.open(target)


def _build(
    target: Path, source: Source, key: str, spec: EncoderSpec, options: PrepareOptions
) -> None:
    bad: list[BadRow] = []
    copies = Duplicates()
    with writing(target.parent):
        writer = StoreWriter(target)
    try:
        for block in _blocks(source, spec, options, bad, copies):
            with writing(target.parent):
                writer.add(block)
        with writing(target.parent):
            writer.finish(_meta(source, key, bad, copies))
    except BaseException:
        writer.abandon()
        raise


def _blocks(
    source: Source,
    spec: EncoderSpec,
    options: PrepareOptions,
    bad: list[BadRow],
    copies: Duplicates,
) -> Iterator[Block]:
    """The source's blocks in order; adds its bad rows to `bad`, or raises at the first, and its
    conversations to `copies`."""
    size = sum(os.path.getsize(p) for p in source.paths)
    workers = options.workers or available_cores()
    batches = options.reading.first_rows(read_batches(source))
    if workers > 1 and size > _PARALLEL_BYTES:
        results = tokenize_in_parallel(batches, spec, options.reading, workers)
    else:
        results = tokenize_serially(batches, spec, options.reading)
    with (
        _imports_at_rest(),
        contextlib.closing(results),
        progress_bar(
            f"tokenising {os.path.basename(source.name)}", size, options.progress
        ) as advance,
    ):
        for batch, result in results:
            if result.bad and options.errors == "strict":
                raise ValueError(_mend(describe(_names(source), result.bad[0])))
            bad.extend(result.bad)
            copies.add(result.block.tokens, result.block.lengths)
            advance(batch.size, len(batch.rows))
            yield result.block


@contextlib.contextmanager
def _imports_at_rest() -> Iterator[None]:
    """Python's collector leaves out what is there already, torch above all: rows make objects by
    the thousand, at each of which thousands it would look through all modules: a tenth of the time.
    """
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _meta(source: Source, key: str, bad: Sequence[BadRow], copies: Duplicates) -> dict[str, Any]:
    return {
        "key": key,
        "paths": _names(source),
        "bad": [astuple(b) for b in bad[:_BAD_KEPT]],
        "duplicates": copies.count(),
    }


def _names(source: Source) -> list[str]:
    return list(source.paths) if source.kind == "files" else [source.name]


def _mend(row: str) -> str:
    return f"{row}; mend the row, or leave bad rows out with --data-errors skip"


def bad_rows(store: TokenStore) -> list[str]:
    """file:line: reason of the rows that a store left out, the first thousand."""
    return [describe(store.meta["paths"], BadRow(*b)) for b in store.meta["bad"]]


def check_bad_rows(store: TokenStore, name: str, options: PrepareOptions) -> None:
    """Raises ValueError where a store left out more rows than the options allow."""
    bad, rows = store.meta["counts"].get("bad_rows", 0), store.meta["counts"].get("rows", 0)
    if bad and options.errors == "strict":
        raise ValueError(_mend(bad_rows(store)[0]))
    limit = options.max_bad_rows
    allowed = limit * rows if limit < 1 else limit
    if bad > allowed:
        raise ValueError(
            f"{name}: {bad} of {rows} rows are bad, more than --max-bad-rows {limit:g} allows; the "
            f"first is {bad_rows(store)[0]}"
        )
    if len(store) == 0:
        raise ValueError(_no_row(store, name))
    if not options.progress:
        return
    if bad:
        terminal.warn(f"warning: {name}: left out {bad} of {rows} rows")
        for line in bad_rows(store)[:_BAD_SAID]:
            terminal.warn(f"left out: {line}")
    if copies := duplicates(store):
        terminal.warn(f"warning: {name}: {copies} of {len(store)} conversations are copies")
    for note, count in notes(store).items():
        terminal.warn(f"warning: {name}: {note} ({count} of {rows} rows)")


def _no_row(store: TokenStore, name: str) -> str:
    """Why no row can be trained on: the first row of each reason."""
    first: dict[str, str] = {}
    for (_, _, reason), line in zip(store.meta["bad"], bad_rows(store), strict=True):
        first.setdefault(reason_kind(reason), line)
    why = "; ".join(list(first.values())[:3])
    return f"{name}: no row can be trained on: {why or 'all have weight 0'}; mend the rows"


def duplicates(store: TokenStore) -> int:
    """Conversations that are copies of others of the item; 0 where an earlier release made it."""
    return int(store.meta.get("duplicates", 0))


def notes(store: TokenStore) -> dict[str, int]:
    """What is said once about rows that train → their number."""
    counts = store.meta["counts"]
    return {k[len(NOTE) :]: v for k, v in counts.items() if k.startswith(NOTE)}
