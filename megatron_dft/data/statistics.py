"""What a data set holds: counts, lengths, supervised share, packing, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dft.data.dataset import ChatDataset
from megatron_dft.data.overlong import Conversations
from megatron_dft.data.prepare import duplicates
from megatron_dft.data.spec import END, ID_MASK, SUPERVISED, WRITTEN
from megatron_dft.data.store import TokenStore, sum_counts
from megatron_dft.data.tokenize_rows import REASON, ZERO_WEIGHT

_PERCENTILES = (0, 50, 90, 99, 100)
# Tokens looked at in one go, so that memory does not grow with the data.
_SLICE_TOKENS = 1 << 22


@dataclass
class Statistics:
    """Figures of a data set, in tokens: what trains, cut as --overlong says.

    lengths: every conversation as it was read, the over-long ones too; bad_rows: reason → rows;
    per_turn_rows: rows whose turns became samples of their own; efficiency, padded_efficiency:
    share of row positions that hold tokens, packed and with one conversation a row; special_inside:
    special tokens that train inside a turn, not at its end; end_tokens, written_tokens: supervised
    ones that end a turn, and that the chat template wrote; weights: (smallest, largest, mean) of
    the supervised tokens, None where no row has one; zero_weight_rows: left out for weight 0;
    duplicates: conversations that are copies of others of their item;
    sources: name → (conversations, of these in an epoch) where there are several.
    """

    rows: int
    conversations: int
    bad_rows: dict[str, int]
    per_turn_rows: int
    overlong: dict[str, int]
    tokens: int
    supervised_tokens: int
    lengths: np.ndarray
    packed_rows: int
    efficiency: float
    padded_efficiency: float
    special_inside: dict[str, int]
    end_tokens: int
    written_tokens: int
    weights: tuple[float, float, float] | None
    zero_weight_rows: int
    duplicates: int
    sources: dict[str, tuple[int, int]]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; lengths as percentiles."""
        plain: dict[str, object] = dict(self.__dict__)
        plain["lengths"] = {f"p{p}": int(np.percentile(self.lengths, p)) for p in _PERCENTILES}
        return plain


def gather(
    stores: Sequence[TokenStore], data: ChatDataset, seq_length: int, special: dict[int, str]
) -> Statistics:
    """Figures of a packed data set that was built from `stores`; special: id → token."""
    counts = sum_counts(s.meta["counts"] for s in stores)
    lengths = data.conversations.lengths()
    all_lengths = np.concatenate([s.lengths() for s in stores])
    found = _count_supervised(data.conversations, special)
    weights = _weights(data.conversations) if data.conversations.has_weights else None
    sizes, drawn = data.conversations.sizes(), data.plan.source_counts()
    return Statistics(
        rows=counts["rows"],
        conversations=len(lengths),
        bad_rows={k[len(REASON) :]: v for k, v in counts.items() if k.startswith(REASON)},
        per_turn_rows=counts["per_turn_rows"],
        overlong=dict(data.counts),
        tokens=int(lengths.sum()),
        supervised_tokens=found.supervised,
        lengths=all_lengths,
        packed_rows=data.rows_per_pass,
        efficiency=data.plan.efficiency(),
        padded_efficiency=float((lengths - 1).sum() / (len(lengths) * seq_length)),
        special_inside=found.inside,
        end_tokens=found.end,
        written_tokens=found.written,
        weights=weights,
        zero_weight_rows=counts.get(ZERO_WEIGHT, 0),
        duplicates=sum(map(duplicates, stores)),
        sources=dict(zip(data.sources, zip(sizes, drawn, strict=True), strict=True))
        if len(data.sources) > 1
        else {},
    )


class _Counts(NamedTuple):
    supervised: int
    inside: dict[str, int]
    end: int
    written: int


def _count_supervised(conversations: Conversations, special: dict[int, str]) -> _Counts:
    """Supervised tokens by kind; inside: special ones that another supervised token follows."""
    supervised = end = written = 0
    inside = np.zeros(max(special, default=0) + 1, dtype=np.int64)
    for flagged in _slices(conversations):
        trains = (flagged & SUPERVISED) != 0
        supervised += int(trains.sum())
        end += int(np.count_nonzero(flagged & END))
        written += int(np.count_nonzero(flagged & WRITTEN))
        ids = (flagged & ID_MASK)[:-1][trains[:-1] & trains[1:]]
        inside += np.bincount(ids[ids < len(inside)], minlength=len(inside))
    found = {token: int(inside[i]) for i, token in special.items() if inside[i]}
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    return _Counts(supervised, ordered, end, written)


def _weights(conversations: Conversations) -> tuple[float, float, float]:
    """Smallest, largest and mean weight of a supervised token."""
    smallest, largest, total, count = np.inf, -np.inf, 0.0, 0
    for number in range(len(conversations)):
        weights = conversations.token_weights(number)
        weights = weights[weights != 0].astype(np.float64)
        smallest, largest = min(smallest, weights.min()), max(largest, weights.max())
        total, count = total + weights.sum(), count + len(weights)
    return float(smallest), float(largest), float(total / count)


def _slices(conversations: Conversations) -> Iterator[np.ndarray]:
    """Conversations, several at once, with a gap between them."""
    gap = np.zeros(1, dtype=np.uint32)
    pieces: list[np.ndarray] = []
    size = 0
    for number in range(len(conversations)):
        pieces += [conversations[number], gap]
        size += len(pieces[-2])
        if size >= _SLICE_TOKENS:
            yield np.concatenate(pieces)
            pieces, size = [], 0
    if pieces:
        yield np.concatenate(pieces)


def summary(stats: Statistics, seq_length: int) -> list[tuple[str, str]]:
    """(label, value) lines for a person."""
    p = {f"p{q}": int(np.percentile(stats.lengths, q)) for q in _PERCENTILES}
    share = stats.supervised_tokens / stats.tokens
    lines = [
        ("rows", f"{stats.rows:,}"),
        ("conversations", f"{stats.conversations:,}"),
        ("tokens", f"{stats.tokens:,}"),
        ("supervised", f"{stats.supervised_tokens:,} ({share:.1%})"),
        ("length", f"median {p['p50']:,}, 90 % {p['p90']:,}, 99 % {p['p99']:,}, max {p['p100']:,}"),
        ("packed rows", f"{stats.packed_rows:,} of {seq_length:,} positions an epoch"),
        ("packing", f"{stats.efficiency:.2%} filled; one a row {stats.padded_efficiency:.2%}"),
    ]
    ends, written = stats.end_tokens, stats.written_tokens
    lines.append(("of these", f"{ends:,} end a turn, {written:,} the template wrote"))
    if stats.weights is not None:
        low, high, mean = stats.weights
        lines.append(("weights", f"{low:g} to {high:g}, mean {mean:.4g} of a supervised token"))
    if stats.duplicates:
        lines.append(("copies", f"{stats.duplicates:,} conversations are copies of others"))
    if stats.zero_weight_rows:
        lines.append(("weight 0", f"{stats.zero_weight_rows:,} rows left out"))
    for name, (size, drawn) in stats.sources.items():
        lines.append(("source", f"{name}: {size:,} conversations, {drawn:,} of them an epoch"))
    if stats.per_turn_rows:
        lines.append(("per turn", f"{stats.per_turn_rows:,} rows became a sample for each turn"))
    lines += [(k.replace("_", " "), f"{v:,}") for k, v in stats.overlong.items() if v]
    lines += [("bad rows", f"{v:,}: {k}") for k, v in stats.bad_rows.items()]
    if stats.special_inside:
        shown = ", ".join(f"{t} {n:,}×" for t, n in list(stats.special_inside.items())[:6])
        lines.append(("inside answers", f"special tokens that train: {shown}"))
    return lines


def write_histogram(path: Path, lengths: np.ndarray, seq_length: int) -> None:
    """A PNG of conversation lengths on a logarithmic axis, --seq-length marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    top = max(int(lengths.max()), seq_length) * 1.1
    edges = np.geomspace(max(int(lengths.min()) * 0.9, 1), top, 60)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.hist(lengths, bins=edges.tolist(), color="#4477aa")
    axes.axvline(seq_length, color="#cc3311", label=f"--seq-length {seq_length:,}")
    axes.set(xscale="log", xlabel="tokens in a conversation", ylabel="conversations")
    axes.set_title(f"{len(lengths):,} conversations, median {int(np.median(lengths)):,} tokens")
    axes.legend()
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
