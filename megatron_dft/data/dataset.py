"""The data set that Megatron's samplers and batch code read: sample index → one training row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_dft.data.order import EpochOrder
from megatron_dft.data.overlong import OVERLONG, fit_conversations
from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.rows import build_row
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.store import TokenStore
from megatron_dft.data.tokenizer import encoder_spec, pad_token_id


class ChatDataset(Dataset):
    """Map-style data set of training rows; sample i depends on (data, seed, i) alone.

    Megatron's own sampler walks the indices in order from `consumed_train_samples` and shards them
    over data-parallel ranks, so every layout and every resume sees the same rows in the same steps.

    Attributes:
        rows_per_pass: with shuffle=False, the rows of one pass over the data, filled up to
            `batch_multiple` with rows whose loss_mask is all zero.
        counts: what was left out or cut, by reason.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        order: EpochOrder,
        *,
        seq_length: int,
        pad_id: int,
        pad_multiple: int,
        num_samples: int | None,
        batch_multiple: int,
        shuffle: bool,
        ends: Sequence[np.ndarray],
        kept: Sequence[np.ndarray],
        counts: dict[str, int],
    ) -> None:
        self._stores, self._order = list(stores), order
        self._seq_length, self._pad_id, self._pad_multiple = seq_length, pad_id, pad_multiple
        self._ends, self._kept, self._shuffle = list(ends), list(kept), shuffle
        self._starts = np.concatenate([[0], np.cumsum([len(k) for k in kept])])
        self._epochs: dict[int, np.ndarray] = {}
        self.counts = counts
        rows = order.epoch_size() if shuffle else int(self._starts[-1])
        self.rows_per_pass = rows if shuffle else -(-rows // batch_multiple) * batch_multiple
        self._length = self.rows_per_pass if num_samples is None else num_samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; keys, dtypes and shapes as rows.build_row gives them."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        members = [self.conversation(int(m)) for m in self.members(index)]
        return build_row(
            members,
            seq_length=self._seq_length,
            pad_id=self._pad_id,
            pad_multiple=self._pad_multiple,
        )

    def members(self, index: int) -> np.ndarray:
        """int64: the conversations in a sample, numbered through all sources; may be none."""
        epoch, slot = divmod(index, self.rows_per_pass)
        if not self._shuffle:
            return np.arange(slot, slot + 1)[: int(slot < self._starts[-1])]
        if epoch not in self._epochs:
            self._epochs = {epoch: self._order.epoch(epoch)}
        return self._epochs[epoch][slot : slot + 1]

    def conversation(self, number: int) -> np.ndarray:
        """uint32 [n]: flagged tokens of conversation `number`, cut as --overlong says."""
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        local = number - self._starts[source]
        row = self._kept[source][local]
        return self._stores[source].flagged(row)[: self._ends[source][local]]


def build_dataset(
    sources: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    seq_length: int,
    num_samples: int | None = None,
    seed: int = 0,
    packing: bool = True,
    pad_multiple: int = 1,
    overlong: str = "refuse",
    errors: str = "strict",
    max_bad_rows: float = 0.001,
    cache_dir: str | os.PathLike[str] | None = None,
    data_format: str | None = None,
    shuffle: bool = True,
    batch_multiple: int = 1,
    template_args: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    rewrites: str = "per-turn",
    progress: bool = False,
    flag: str = "--train-data",
) -> ChatDataset:
    """Tokenises (or finds in the cache) and orders a data set.

    Args:
        sources: paths or hub names, all or none with a weight: `["0.7:a.jsonl", "0.3:b.parquet"]`.
        tokenizer: a transformers fast tokenizer with a chat template (tokenizer.load_tokenizer).
        seq_length: positions in a row, Megatron's --seq-length.
        num_samples: how many samples training will take; the order does not depend on it. None
            for one pass.
        packing: several conversations a row; otherwise one a row, padded.
        pad_multiple: positions each conversation is padded to: 2 × context-parallel size with
            context parallelism, else 1.
        overlong: "refuse", "drop" or "truncate" (at the end of an assistant turn) conversations
            that do not fit.
        errors: "strict" stops at the first bad row; "skip" leaves out up to max_bad_rows.
        shuffle: False for validation: each conversation once, in file order; a pass is filled up
            to batch_multiple (the global batch size) with rows that do not count.
        cache_dir: where the tokenised data is kept; None keeps it in memory.
        flag: the command line flag that errors name.

    Raises ValueError with one line for every fault of the data or of the settings.
    """
    if seq_length < 1 or pad_multiple < 1 or seq_length % pad_multiple:
        raise ValueError(
            f"--seq-length {seq_length} must be a multiple of {pad_multiple} (2 × "
            "--context-parallel-size), which each packed conversation is padded to"
        )
    if packing:
        raise ValueError("packing is not available yet; use --no-packing")
    if overlong not in OVERLONG:
        raise ValueError(f"--overlong {overlong!r}: expected one of {', '.join(OVERLONG)}")
    parsed = parse_sources(sources, flag)
    spec = encoder_spec(
        tokenizer, template_args=template_args, template_date=template_date, rewrites=rewrites
    )
    options = PrepareOptions(data_format, errors, max_bad_rows, cache_dir, None, progress)
    stores = prepare(parsed, spec, options, flag)
    kept, ends, counts = fit_conversations(stores, seq_length, overlong)
    weights = [s.weight for s in parsed if s.weight is not None] or None
    return ChatDataset(
        stores,
        EpochOrder([len(k) for k in kept], weights, seed),
        seq_length=seq_length,
        pad_id=pad_token_id(tokenizer),
        pad_multiple=pad_multiple,
        num_samples=num_samples,
        batch_multiple=batch_multiple,
        shuffle=shuffle,
        ends=ends,
        kept=kept,
        counts=counts,
    )
