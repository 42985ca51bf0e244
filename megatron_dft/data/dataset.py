"""The data set that Megatron's samplers and batch code read: sample index → one training row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_dft.data.held_out import held_out
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.order import EpochOrder
from megatron_dft.data.overlong import Conversations
from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.reference_scores import ReferenceScores
from megatron_dft.data.row_plan import RowPlan, pack_granularity
from megatron_dft.data.rows import build_row
from megatron_dft.data.sources import Source, parse_sources
from megatron_dft.data.store import TokenStore
from megatron_dft.data.tokenizer import encoder_spec, pad_token_id


class ChatDataset(Dataset):
    """Map-style data set of training rows; sample i depends on (data, seed, i) alone.

    Megatron's own sampler walks the indices in order from `consumed_train_samples` and shards them
    over data-parallel ranks, so every layout and every resume sees the same rows in the same steps.

    Attributes:
        plan: which conversations share a row.
        counts: conversations and tokens that were left out or cut, by reason.
        identity: what the rows depend on, for fingerprint.check_resume.
        pad_multiple: positions that each conversation is padded to.
        scores: a reference's log-probabilities of the conversations, None for rows without.
        sources: names of the items of --train-data, which a row's source_ids count from 0.

    Rows hold token_weights where any row of the data has a weight, and source_ids where there is
    more than one source (rows.build_row).
    """

    def __init__(
        self,
        conversations: Conversations,
        plan: RowPlan,
        *,
        seq_length: int,
        pad_id: int,
        pad_multiple: int,
        packing: bool,
        identity: dict[str, Any],
        scores: ReferenceScores | None = None,
        sources: Sequence[str] = ("",),
    ) -> None:
        self.scores, self.sources = scores, list(sources)
        self.conversations, self.plan, self.identity = conversations, plan, identity
        self.counts = conversations.counts
        self._seq_length, self._pad_id, self.pad_multiple = seq_length, pad_id, pad_multiple
        # One more for the padding behind the last conversation.
        self._max_segments = plan.most_members() + 1 if packing else None

    @property
    def rows_per_pass(self) -> int:
        """Rows of the first epoch; with shuffle=False filled up to `batch_multiple`."""
        return self.plan.rows_per_pass

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; keys, dtypes and shapes as rows.build_row gives them."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.row([int(m) for m in self.plan.members(index)])

    def row(self, members: Sequence[int]) -> dict[str, torch.Tensor]:
        """A row of these conversations, which have to fit; as `__getitem__` gives it."""
        segments, found = self._max_segments, self.conversations
        return build_row(
            [found[m] for m in members],
            max_segments=None if segments is None else max(segments, len(members) + 1),
            reference_log_prob=None if self.scores is None else [self.scores[m] for m in members],
            seq_length=self._seq_length,
            pad_id=self._pad_id,
            pad_multiple=self.pad_multiple,
            token_weights=[found.token_weights(m) for m in members] if found.has_weights else None,
            sources=[found.source(m) for m in members] if len(self.sources) > 1 else None,
        )


def build_dataset(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Any, options: DatasetOptions
) -> ChatDataset:
    """Tokenises (or finds in the cache) and orders a data set.

    Args:
        sources: paths or hub names, all or none with a weight: `["0.7:a.jsonl", "0.3:b.parquet"]`;
            also `cap=1000:a.jsonl` and `epochs=2:b.parquet` (sources.parse_sources).
        tokenizer: a transformers fast tokenizer with a chat template (tokenizer.load_tokenizer).

    Raises ValueError with one line for every fault of the data or of the settings.
    """
    parsed, stores = _read(sources, tokenizer, options)
    weights = [s.weight for s in parsed if s.weight is not None] or None
    mixed = any(s.cap is not None or s.epochs is not None for s in parsed)
    chosen = _part(stores, options.valid_share, options.held_out_part)
    granularity = pack_granularity(options.pad_multiple) if options.packing else 1
    group = 2 if options.pairs else 1
    conversations = Conversations(
        stores,
        options.seq_length,
        options.overlong,
        chosen,
        granularity if options.pairs else None,
    )
    order = EpochOrder(
        [size // group for size in conversations.sizes()],
        weights if options.shuffle else None,
        options.seed,
        [s.cap for s in parsed],
        [s.epochs for s in parsed],
        shuffled=not options.in_order,
    )
    if options.shuffle:
        _check_counts(parsed, order.counts(), options.flag)
    identity: dict[str, Any] = {
        "sources": [s.meta["parts"] for s in stores],
        "weights": weights,
        "seed": options.seed,
        "seq_length": options.seq_length,
        "overlong": options.overlong,
        "packing": options.packing,
        "pack_granularity": granularity,
    }
    # Absent where they are not used, as in what earlier runs have recorded.
    if mixed:
        identity["mixture"] = [[s.cap, s.epochs] for s in parsed]
    if options.valid_share:
        identity["valid_share"] = options.valid_share
        identity["held_out_part"] = options.held_out_part
    if options.in_order:
        identity["shuffled"] = False
    scores = None
    if options.reference_scores is not None:
        scores = ReferenceScores(options.reference_scores).attach(conversations, identity)
    plan = RowPlan(
        order,
        conversations.lengths() - 1,  # the last token of each is a label only
        seq_length=options.seq_length,
        packing=options.packing,
        granularity=granularity,
        shuffle=options.shuffle,
        seed=options.seed,
        num_samples=options.num_samples,
        batch_multiple=options.batch_multiple,
        cache=None if options.cache_dir is None else Path(options.cache_dir) / "packs",
        cache_key=identity,
        group=group,
    )
    return ChatDataset(
        conversations,
        plan,
        seq_length=options.seq_length,
        pad_id=pad_token_id(tokenizer, options.vocab_size),
        pad_multiple=options.pad_multiple,
        packing=options.packing,
        identity=identity,
        scores=scores,
        sources=[s.name for s in parsed],
    )


def check_rows(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Any, options: DatasetOptions
) -> None:
    """What `build_dataset` refuses of the rows themselves; of the first max_samples of each item.

    Raises ValueError with one line.
    """
    _, stores = _read(sources, tokenizer, options)
    Conversations(stores, options.seq_length, options.overlong)


def _read(
    sources: Sequence[str | os.PathLike[str]], tokenizer: Any, options: DatasetOptions
) -> tuple[list[Source], list[TokenStore]]:
    """The items and their tokens."""
    parsed = parse_sources(sources, options.flag)
    drawn = any((s.weight, s.cap, s.epochs) != (None, None, None) for s in parsed)
    if drawn and not options.shuffle and not options.held_out_part:
        raise ValueError(
            f"{options.flag}: weights mean nothing here, where each conversation is read once; "
            "drop them"
        )
    if drawn and options.in_order:
        raise ValueError(
            f"--no-shuffle: shares, cap= and epochs= of {options.flag} draw conversations at "
            "random; drop them, or the flag"
        )
    spec = encoder_spec(
        tokenizer,
        template_args=options.template_args,
        template_date=options.template_date,
        rewrites=options.rewrites,
        drops=options.drops,
    )
    stores = prepare(
        parsed,
        spec,
        PrepareOptions(
            options.reading,
            options.errors,
            options.max_bad_rows,
            options.cache_dir,
            options.workers,
            options.progress,
            options.vocab_size,
        ),
    )
    return parsed, stores


def _part(
    stores: Sequence[TokenStore], valid_share: float, held_out_part: bool
) -> list[np.ndarray] | None:
    """Which conversations of each store are used; None for all of them."""
    if not valid_share:
        return None
    if not 0 < valid_share < 1:
        raise ValueError(f"--valid-share {valid_share:g}: expected a share between 0 and 1")
    apart = [held_out(store, valid_share) for store in stores]
    if not any(a.any() for a in apart):
        raise ValueError(
            f"--valid-share {valid_share:g}: no source has two different rows, so none can be held "
            "out; give --valid-data"
        )
    return apart if held_out_part else [~a for a in apart]


def _check_counts(sources: Sequence[Source], counts: Sequence[int], flag: str) -> None:
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise ValueError(
                f"{flag}: {source.name!r} would give no conversation to an epoch; raise its share, "
                "cap or epochs, or leave it out"
            )
