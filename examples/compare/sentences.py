"""What each table of the comparison's report says, in a sentence made of its figures."""

from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import Any

Found = dict[str, Any]
ORTHOGONAL = 0.1  # |cosine| below it: the updates have next to nothing in common


def _named(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _ends(rows: Found, field: str, form: str) -> str:
    """`0.007 (grpo) to 0.057 (offline-dft)`: the lowest and the highest mean."""
    low, high = (f(rows, key=lambda name: rows[name][field]["mean"]) for f in (min, max))
    return " to ".join(f"{rows[name][field]['mean']:{form}} ({name})" for name in (low, high))


def end(found: Found) -> str:
    rows, base = found["tables"]["end"], found["base"]
    return (
        f"Of {base['greedy']:.1%} greedy the base came to {_ends(rows, 'greedy', '.1%')}, of "
        f"{base['sampled']:.1%} sampled to {_ends(rows, 'sampled', '.1%')}; the weights moved by "
        f"{_ends(rows, 'relative_norm', '.4f')} of their norm."
    )


def matched(found: Found) -> str:
    rows, methods = found["tables"]["matched"], found["tables"]["end"]
    if not rows:
        return "No method reached it in every seed."
    missed = [name for name in methods if name not in rows]
    text = f"{_named(missed)} did not reach it in every seed" if missed else "All reached it"
    drift, task = _ends(rows, "relative_norm", ".4f"), _ends(rows, "kl_task", ".3f")
    return f"{text}; the others moved by {drift}, at a task KL of {task}."


def where(found: Found) -> str:
    """Which kind of weight holds the largest share of each method's update."""
    groups: dict[str, list[str]] = {}
    for name, by_seed in found["curves"].items():
        kinds = by_seed[0][-1]["modules"]
        share = {k: fmean(curve[-1]["modules"][k] for curve in by_seed) for k in kinds}
        groups.setdefault(max(share, key=share.__getitem__), []).append(name)
    parts = (f"in {kind} for {_named(names)}" for kind, names in groups.items())
    return f"The largest share lies {'; '.join(parts)}."


def cosines(found: Found) -> str:
    names = list(found["cosine"])
    pairs = {
        (a, b): found["cosine"][a][b] or 0.0 for i, a in enumerate(names) for b in names[i + 1 :]
    }
    if not pairs:
        return "One method alone."
    best = max(pairs, key=pairs.__getitem__)
    apart = sum(abs(value) < ORTHOGONAL for value in pairs.values())
    return (
        f"Most alike are {_named(best)} ({pairs[best]:.3f}); {apart} of {len(pairs)} pairs are "
        f"nearly orthogonal (below {ORTHOGONAL})."
    )


def forgetting(found: Found) -> str:
    known = {name: abs(v) for name, v in found["forgetting"].items() if v is not None}
    return f"{max(known, key=known.__getitem__)} goes with it most." if known else ""


def claims(found: Found) -> str:
    counts = Counter(c["verdict"] for c in found["claims"] if c["verdict"] != "not run")
    said = _named([f"{number} {verdict}" for verdict, number in counts.items()] or ["none told"])
    return f"Of {counts.total()} claims that can be told here: {said}."


def sweep(found: Found) -> str:
    """Which choices lie at an edge of their sweep: a better one may lie outside."""
    swept = {name: scores for name, scores in found["sweep"].items() if len(scores) > 1}
    if not swept:
        return "No method had a choice."
    best = {name: max(scores, key=scores.__getitem__) for name, scores in swept.items()}
    ends = {name: sorted(scores, key=float) for name, scores in swept.items()}
    edge = [name for name in swept if best[name] in (ends[name][0], ends[name][-1])]
    if not edge:
        return "Every choice lies inside its sweep."
    return f"At an edge of the sweep, so that a better one may lie outside: {_named(edge)}."
