"""Conversations longer than a row: refused, dropped, or cut behind a whole assistant turn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_dft.data.spec import SUPERVISED
from megatron_dft.data.store import TokenStore

OVERLONG = ("refuse", "drop", "truncate")


class Conversations:
    """All usable conversations of several stores, numbered through, cut to fit a row.

    stores: where they lie; counts: what fit_conversations left out or cut. Raises ValueError as it
    does.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        seq_length: int,
        overlong: str,
        chosen: Sequence[np.ndarray] | None = None,
        pair_granularity: int | None = None,
    ) -> None:
        """chosen: bool [N] for each store, which of its conversations are used; None for all.
        pair_granularity: as of fit_conversations."""
        self.stores = list(stores)
        self._kept, self._ends, self.counts = fit_conversations(
            stores, seq_length, overlong, chosen, pair_granularity
        )
        self.has_weights = any(s.weights is not None for s in stores)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes())])

    def sizes(self) -> list[int]:
        """Usable conversations in each store."""
        return [len(k) for k in self._kept]

    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each conversation."""
        return np.concatenate(self._ends)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def digest(self) -> str:
        """Which conversations are used and where they are cut, as a hash."""
        found = hashlib.sha256()
        for array in (*self._kept, *self._ends):
            found.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return found.hexdigest()[:32]

    def __getitem__(self, number: int) -> np.ndarray:
        """uint32 [n]: flagged tokens of one conversation (see spec.SUPERVISED)."""
        store, local = self._locate(number)
        flagged = self.stores[store].flagged(int(self._kept[store][local]))
        return flagged[: self._ends[store][local]]

    def token_weights(self, number: int) -> np.ndarray:
        """float32 [n]: the factor on each token's loss, above 0 exactly where it trains."""
        store, local = self._locate(number)
        weights = self.stores[store].token_weights(int(self._kept[store][local]))
        return weights[: self._ends[store][local]]

    def source(self, number: int) -> int:
        """Which of the stores a conversation is in."""
        return self._locate(number)[0]

    def where(self, number: int) -> str:
        """file:line of the row that a conversation came from."""
        store, local = self._locate(number)
        return self.stores[store].where(int(self._kept[store][local]))

    def _locate(self, number: int) -> tuple[int, int]:
        store = int(np.searchsorted(self._starts, number, side="right")) - 1
        return store, number - int(self._starts[store])


def fit_conversations(
    stores: Sequence[TokenStore],
    seq_length: int,
    overlong: str,
    chosen: Sequence[np.ndarray] | None = None,
    pair_granularity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, int]]:
    """Which conversations of each store are used, and how many of their tokens.

    A conversation of n tokens takes n - 1 positions (its last token is a label only). With
    pair_granularity conversations 2k and 2k + 1 are a pair: both fit in one row together, each
    counted in multiples of it, or neither is used.

    Returns for each store int64 indices and int64 token counts, and over all the counts
    "overlong_dropped", "overlong_truncated" and "overlong_tokens_cut". Raises ValueError for
    "refuse" where one does not fit, and where none is left.
    """
    kept, ends = [], []
    counts = {"overlong_dropped": 0, "overlong_truncated": 0, "overlong_tokens_cut": 0}
    for number, store in enumerate(stores):
        lengths = store.lengths()
        if chosen is not None:
            lengths = np.where(chosen[number], lengths, 0)
        positions = _positions(lengths, pair_granularity)
        too_long = np.flatnonzero(positions > seq_length)
        if len(too_long) and overlong == "refuse":
            worst = int(too_long[0])
            raise ValueError(
                f"{len(too_long)} of {len(store)} conversations are longer than --seq-length "
                f"{seq_length}; the first, {store.where(worst)}, takes {positions[worst]}"
                f"{_remedy(pair_granularity)}"
            )
        end = lengths.copy()
        if overlong == "truncate":
            for index in too_long:
                end[index] = last_whole_turn(store.flagged(int(index)), seq_length)
        else:
            end[too_long] = 0
        use = np.flatnonzero(end)
        counts["overlong_dropped"] += int(np.count_nonzero(lengths)) - len(use)
        counts["overlong_truncated"] += int((end[use] < lengths[use]).sum())
        counts["overlong_tokens_cut"] += int((lengths - end).sum())
        kept.append(use)
        ends.append(end[use])
    if not sum(map(len, kept)):
        raise ValueError(
            f"no conversation fits --seq-length {seq_length}; raise it, or choose "
            "--overlong truncate"
        )
    return kept, ends, counts


def _positions(lengths: np.ndarray, pair_granularity: int | None) -> np.ndarray:
    """int64 [N]: positions that a conversation, or the pair that it is of, takes in a row."""
    if pair_granularity is None:
        return lengths - 1
    rounded = -(-(lengths - 1) // pair_granularity) * pair_granularity
    return rounded.reshape(-1, 2).sum(1).repeat(2)


def _remedy(pair_granularity: int | None) -> str:
    if pair_granularity is None:
        return "; raise --seq-length, or choose --overlong drop or --overlong truncate"
    return " with the other answer of its pair; raise --seq-length, or choose --overlong drop"


def last_whole_turn(flagged: np.ndarray, seq_length: int) -> int:
    """Tokens up to the end of the last assistant turn that ends within a row; 0 where none does."""
    # Behind the last token that fits as a label, positions 0 … seq_length of the conversation.
    supervised = (flagged[: seq_length + 2] & SUPERVISED) != 0
    ends = np.flatnonzero(supervised[:-1] & ~supervised[1:]) + 1
    return int(ends[-1]) if len(ends) and ends[-1] >= 2 else 0
