"""What the figures of a drift report say, in a sentence or two a section."""

from collections.abc import Iterable
from typing import Any

from megatron_dft.drift import columns

Report = dict[str, Any]
# arXiv 2505.11711: shares of weights left exactly as they were, in the load dtype.
RL_UNCHANGED, SFT_UNCHANGED = (0.70, 0.95), (0.06, 0.15)
ORTHOGONAL = 0.1  # |cosine| below it: the updates have next to nothing in common


def percent(value: float | None) -> str:
    """A share as text, small ones with two digits."""
    if value is None:
        return "none"
    return f"{value:.1%}" if value == 0 or value >= 0.001 else f"{100 * value:.2g}%"


def _values(report: Report, field: str) -> dict[str, float]:
    """Method → the model's figure, without those that have none."""
    found = {label: m["model"][field] for label, m in report["methods"].items()}
    return {label: value for label, value in found.items() if value is not None}


def _span(values: dict[str, float], show: Any = percent) -> str:
    """`3 % (a)`, or `1 % (a) to 3 % (b)`."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if low == high or values[low] == values[high]:
        return f"{show(values[low])} ({', '.join(values)})"
    return f"{show(values[low])} ({low}) to {show(values[high])} ({high})"


def overview(report: Report) -> str:
    norms = {k: v for k, v in _values(report, "relative_norm").items() if v}
    if not norms:
        return "Nothing moved: every weight is that of the base."
    text = f"The weights moved by {_span(norms)} of the base's norm"
    if len(norms) > 1:
        text += f", {max(norms.values()) / min(norms.values()):.2g} times apart"
    unchanged = _values(report, "unchanged")
    low, high = RL_UNCHANGED
    like = [k for k, v in unchanged.items() if v >= low]
    text += f"; {_span(unchanged)} of them kept their value in the load dtype. "
    few = f"{SFT_UNCHANGED[0]:.0%} to {SFT_UNCHANGED[1]:.0%}"
    if like:
        more = " or sparser" if any(unchanged[k] > high for k in like) else ""
        text += (
            f"As sparse as what RL was seen to leave ({low:.0%} to {high:.0%}; SFT {few}, arXiv "
            f"2505.11711){more}: {', '.join(like)}."
        )
    else:
        text += f"None is as sparse as RL's updates ({low:.0%} to {high:.0%}, arXiv 2505.11711)."
    return text


def _extreme(rows: dict[str, Report]) -> tuple[str, str, float] | None:
    moved = {k: v["relative_norm"] for k, v in rows.items() if v["relative_norm"]}
    if not moved:
        return None
    high, low = max(moved, key=moved.__getitem__), min(moved, key=moved.__getitem__)
    return high, low, moved[high] / moved[low]


def _grouped(found: Iterable[tuple[str, str]]) -> str:
    """`v (sft, dft); down (es)` from pairs of (what, method)."""
    groups: dict[str, list[str]] = {}
    for what, label in found:
        groups.setdefault(what, []).append(label)
    return "; ".join(f"{what} ({', '.join(labels)})" for what, labels in groups.items())


def layers(report: Report) -> str:
    depth, kind, spread = [], [], []
    for label, method in report["methods"].items():
        numbered = {k: v for k, v in method["layers"].items() if k.isdecimal()}
        if (found := _extreme(numbered)) is not None:
            depth.append((f"layer {found[0]}", label))
            spread.append(found[2])
        if (found := _extreme(method["modules"])) is not None:
            kind.append((found[0], label))
    if not kind:
        return "No layer moved."
    text = f"Relative to its size the most moved kind of weight is {_grouped(kind)}"
    if depth:
        even = "the update is spread over all depths" if max(spread) < 2 else "depths differ"
        text += f"; among layers {_grouped(depth)}, up to {max(spread):.2g} times the least moved"
        text += f": {even}"
    return text + "."


def where(report: Report) -> str:
    ks = columns.principal_ks(report)
    parts = []
    if ks:
        k = ks[len(ks) // 2]
        over = {}
        for label, method in report["methods"].items():
            share = columns.principal(method["model"], k, "both")
            expected = columns.principal(method["model"], k, "both_chance")
            if share is not None and expected:
                over[label] = share / expected
        if over:
            sides = {"on": [k for k, v in over.items() if v > 2]}
            sides["off"] = [k for k, v in over.items() if v < 0.5]
            named = [f"{side} them lie {', '.join(who)}" for side, who in sides.items() if who]
            verdict = ", ".join(named) or "none lies on or off them"
            text = _span(over, lambda v: f"{v:.2g} times")
            parts.append(
                f"The base's {k} leading directions hold {text} what a random update would put "
                f"there: {verdict}."
            )
    near = _values(report, "changed_near_zero")
    if near:
        base = next(iter(report["methods"].values()))["model"]["near_zero"]
        drawn = [k for k, v in near.items() if base and v > 1.5 * base]
        word = f"sought out by {', '.join(drawn)}" if drawn else "small weights are not preferred"
        parts.append(
            f"Of the changed weights {_span(near)} were near zero, of all weights {percent(base)}: "
            f"{word}."
        )
    return " ".join(parts) or "No matrix changed."


def concentration(report: Report) -> str:
    top = _values(report, "top1pct_share")
    if not top:
        return "No weight moved."
    text = f"The largest 1% of the entries hold {_span(top)} of ‖Δ‖²"
    medians = {}
    for label, method in report["methods"].items():
        found = sorted(
            row["stable_rank"] for row in method["tensors"].values() if row["stable_rank"]
        )
        if found:
            medians[label] = found[len(found) // 2]
    if medians:
        few = [k for k, v in medians.items() if v < 4]
        text += f"; the median stable rank of a matrix is {_span(medians, lambda v: f'{v:.3g}')}"
        text += f": {', '.join(few)} moved along few directions" if few else ": many directions"
    return text + "."


def agreement(report: Report) -> str:
    found = report["agreement"]
    labels, cosine = found["labels"], found["model"]["cosine"]
    size = range(len(labels))
    pairs = {
        f"{labels[j]} · {labels[i]}": (i, j)
        for i in size
        for j in range(i)
        if cosine[i][j] is not None
    }
    if not pairs:
        return "At most one method moved a weight."
    values = {name: cosine[i][j] for name, (i, j) in pairs.items()}
    best = max(values, key=values.__getitem__)
    apart = sum(abs(v) < ORTHOGONAL for v in values.values())
    i, j = pairs[best]
    jaccard, luck = (found["model"][f][i][j] for f in ("jaccard", "jaccard_by_chance"))
    return (
        f"Most alike are {best}: cosine {values[best]:.2f}, and they changed the same weights with "
        f"a Jaccard index of {jaccard:.2f} ({luck:.2f} by chance). {apart} of {len(values)} pairs "
        f"are nearly orthogonal (|cosine| < {ORTHOGONAL})."
    )


def tokens(report: Report) -> str:
    shares = {}
    for label, method in report["methods"].items():
        rows = list(method["tokens"].values())
        total = sum(r["rows"] for r in rows)
        if total:
            shares[label] = sum(r["changed_rows"] for r in rows) / total
    if not shares:
        return "No embedding or head was compared."
    return (
        f"{_span(shares)} of the rows changed at all; rows that did not are tokens never trained."
    )


def tensors(report: Report) -> str:
    found = []
    for label, method in report["methods"].items():
        if (extreme := _extreme(method["tensors"])) is not None:
            found.append((extreme[0], label))
    return f"Moved most for its size: {_grouped(found)}." if found else "No tensor moved."
