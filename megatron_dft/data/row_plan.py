"""Sample index → which conversations share that row: the one place that knows epochs."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dft.data.order import EpochOrder
from megatron_dft.data.packing import Packs, pack
from megatron_dft.storage.files import whole_file

_VERSION = 1
_GRANULARITY = 8
# Conversations of an epoch that is packed in milliseconds: of a small set a run may take thousands.
_SMALL = 4096
# Epochs whose packs are mapped: each holds a file descriptor.
_MAPPED = 64


def pack_granularity(pad_multiple: int) -> int:
    """In what multiples packing counts lengths, given what context parallelism pads them to.

    Eight serves every context-parallel size up to four alike, so that these layouts share rows and
    a run may go on with another of them; it costs 3.5 positions a conversation on average.
    """
    return _GRANULARITY if _GRANULARITY % pad_multiple == 0 else pad_multiple


class RowPlan:
    """The rows of every epoch that a run of `num_samples` samples meets.

    Args:
        order: which conversations come in which epoch.
        lengths: int64 [N]: positions that each conversation takes, without padding.
        seq_length: positions in a row.
        packing: as many conversations as fit in a row; otherwise one.
        granularity: packing counts each conversation in multiples of it (pack_granularity).
        shuffle: False for validation: one pass in file order, over and over, filled up to
            batch_multiple rows with empty ones.
        seed: the run's seed.
        num_samples: samples that will be asked for; None for one pass.
        cache: directory for the packs of large epochs, or None to keep them in memory.
        cache_key: identifies the conversations behind `lengths`.
        group: conversations that stay together: `order` then counts groups, group g being the
            conversations g·group … g·group + group − 1, in that order in their row.
    """

    def __init__(
        self,
        order: EpochOrder,
        lengths: np.ndarray,
        *,
        seq_length: int,
        packing: bool,
        granularity: int,
        shuffle: bool,
        seed: int,
        num_samples: int | None,
        batch_multiple: int = 1,
        cache: Path | None = None,
        cache_key: Any = None,
        group: int = 1,
    ) -> None:
        self._group = group
        self._order, self._lengths, self._seq_length = order, lengths, seq_length
        self._packing, self._shuffle, self._seed = packing, shuffle, seed
        rounded = -(-lengths // granularity) * granularity
        self._sizes = np.minimum(rounded, seq_length)
        self._cache = cache
        text = json.dumps([_VERSION, cache_key, seq_length, granularity, shuffle, seed])
        self._name = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._epochs = [self._epoch(0)]
        self._ends = [len(self._epochs[0])]
        if not shuffle:
            self._ends = [-(-self._ends[0] // batch_multiple) * batch_multiple]
        self.rows_per_pass = self._ends[0]
        self.num_samples = self.rows_per_pass if num_samples is None else num_samples
        while shuffle and self._ends[-1] < self.num_samples:
            self._add_epoch()

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows of the first `epochs` epochs; part of one is that share of its rows, rounded up."""
        while len(self._epochs) < epochs:
            self._add_epoch()
        whole = int(epochs)
        rows = self._ends[whole - 1] if whole else 0
        part = epochs - whole
        return rows + (math.ceil(part * len(self._epochs[whole])) if part else 0)

    def epochs(self) -> float:
        """Epochs that the samples of the run make."""
        epoch, row = self.locate(self.num_samples)
        return epoch + (row / len(self._epochs[epoch]) if row else 0)

    def _add_epoch(self) -> None:
        self._epochs.append(self._epoch(len(self._epochs)))
        self._ends.append(self._ends[-1] + len(self._epochs[-1]))

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, row in it) of a sample."""
        if not self._shuffle:
            return 0, index % self.rows_per_pass
        epoch = bisect_right(self._ends, index)
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

    def members(self, index: int) -> np.ndarray:
        """int64: conversations in a sample; none in a row that only fills up a batch."""
        epoch, row = self.locate(index)
        packs = self._epochs[epoch]
        return packs.row(row) if row < len(packs) else packs.members[:0]

    def rows_of(self, conversations: np.ndarray) -> list[list[int]]:
        """These conversations (int64), each once, in rows like the plan's own."""
        if not self._packing:
            return [[c] for c in conversations.tolist()]
        packs = pack(conversations, self._sizes, self._seq_length, None)  # no group is kept
        return [packs.row(i).tolist() for i in range(len(packs))]

    def most_members(self) -> int:
        return max(p.most_members() for p in self._epochs)

    def source_counts(self) -> list[int]:
        """Conversations that each source gives to an epoch."""
        return self._order.counts()

    def efficiency(self) -> float:
        """Share of the first epoch's positions that hold a conversation's tokens."""
        packs = self._epochs[0]
        used = int(self._lengths[packs.members].sum())
        return used / (len(packs) * self._seq_length) if len(packs) else 0.0

    def _epoch(self, epoch: int) -> Packs:
        if not self._packing:
            members = self._order.epoch(epoch) if self._shuffle else self._order.in_file_order()
            return Packs(members, np.arange(len(members) + 1))
        path, mapped = None, epoch < _MAPPED
        if self._cache is not None and self._order.epoch_size() > _SMALL:
            path = self._cache / f"{self._name}-{epoch}.packs"
            if path.exists():
                return _load(path, mapped)
        order = self._order.epoch(epoch) if self._shuffle else self._order.in_file_order()
        key = (self._seed, 2, epoch) if self._shuffle and self._order.shuffled else None
        sizes = self._sizes.reshape(-1, self._group).sum(1)
        packs = self._conversations_of(pack(order, sizes, self._seq_length, key))
        if path is None:
            return packs
        try:
            _save(path, packs)
            return _load(path, mapped)
        except OSError:  # a cache that is read-only or full: packed again at the next start
            return packs

    def _conversations_of(self, groups: Packs) -> Packs:
        """Rows of groups as rows of their conversations."""
        if self._group == 1:
            return groups
        first = np.asarray(groups.members)[:, None] * self._group
        return Packs((first + np.arange(self._group)).reshape(-1), groups.starts * self._group)


def _save(path: Path, packs: Packs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks that pack at the same time write the same bytes; the last rename changes nothing.
    with whole_file(path) as file:
        head = np.array([len(packs.starts), len(packs.members)], dtype="<i8")
        for array in (head, packs.starts, packs.members):
            file.write(array.astype("<i8", copy=False).tobytes())


def _load(path: Path, mapped: bool) -> Packs:
    data = np.memmap(path, dtype="<i8", mode="r") if mapped else np.fromfile(path, dtype="<i8")
    starts = int(data[0])
    if len(data) != 2 + starts + int(data[1]):
        raise ValueError(f"the packing cache {str(path)!r} is damaged; delete it and start again")
    return Packs(data[2 + starts :], data[2 : 2 + starts])
