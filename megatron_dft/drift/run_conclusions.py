"""What the figures of a comparison of runs say, in a sentence or two a section."""

from collections.abc import Sequence

from megatron_dft.drift.page import number
from megatron_dft.drift.run_figures import (
    ACCURACY,
    CROSS_ENTROPY,
    END_PROB,
    GRAD_NORM,
    HELD_OUT,
    PROB,
    best,
    differing,
    groups_by_rate,
    held_out,
    last,
    late_mean,
)
from megatron_dft.drift.run_log import Run

_ROSE = 1.01  # times the lowest: beyond what one evaluation set's rounding gives
_LOW_END = 0.5
_SPIKE = 10.0  # times the median


def _ends(runs: Sequence[Run], tag: str) -> dict[str, float]:
    found = {run.label: last(held_out(run, tag)[1]) for run in runs}
    return {label: value for label, value in found.items() if value is not None}


def _span(values: dict[str, float]) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if values[low] == values[high]:
        return f"{number(values[low])} ({', '.join(values)})"
    return f"{number(values[low])} ({low}) to {number(values[high])} ({high})"


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why figures of the table may not be compared as they stand."""
    varied, said = differing(runs), []
    if any(name in varied for name in ("valid_data", "valid_data_format", "chat_template")):
        said.append("The runs were evaluated on different data: their held-out figures differ too.")
    if "hf_model" in varied:
        said.append("They start from different models.")
    evaluated = [r.label for r in runs if r.figures.get(CROSS_ENTROPY + HELD_OUT)]
    blind = [r.label for r in runs if r.label not in evaluated]
    if blind:
        said.append(
            f"Without held-out figures: {', '.join(blind)}; give --valid-data. Their probability "
            "and accuracy are those of training."
        )
    behind = [r for r in runs if r.step < max(one.step for one in runs)]
    if behind:
        where = ", ".join(f"{r.label} {r.step:,}" for r in behind)
        most = max(r.step for r in runs)
        said.append(f"Behind the others, which are at step {most:,}: {where}.")
    bad = [f"{r.label} {r.not_finite:,}" for r in runs if r.not_finite]
    if bad:
        said.append(f"Figures that were NaN or inf, in no table: {', '.join(bad)}.")
    return said


def verdict(runs: Sequence[Run]) -> tuple[str, str]:
    """(who has the lowest held-out cross entropy, what that does and does not mean)."""
    ends = {r.label: last(r.figures.get(CROSS_ENTROPY + HELD_OUT, {})) for r in runs}
    known = {label: value for label, value in ends.items() if value is not None}
    where = "on held-out data"
    if not known:
        where = "in training; none was evaluated"
        late = {r.label: late_mean(r.figures.get(CROSS_ENTROPY, {})) for r in runs}
        known = {label: value for label, value in late.items() if value is not None}
    if not known:
        return "No cross entropy", f"None of the runs has logged a figure named {CROSS_ENTROPY}."
    order = sorted(known, key=known.__getitem__)
    word = f"{order[0]} ends with the lowest cross entropy"
    text = f"{number(known[order[0]])} nats a token {where}"
    if len(order) > 1:
        text += f"; {order[1]} follows with {number(known[order[1]])}"
    if "loss" in differing(runs):
        text += (
            ". Cross entropy is what sft minimises and the weighted losses do not: it says nothing "
            "for or against them. Between losses choose by what the models do: megatron-dft "
            "evaluate, and megatron-dft retention for what they forgot"
        )
    return word, text + "."


def cross_entropy(runs: Sequence[Run]) -> str:
    rose = []
    for run in runs:
        series = run.figures.get(CROSS_ENTROPY + HELD_OUT, {})
        lowest, end = best(series), last(series)
        if lowest and end is not None and end > _ROSE * lowest[1]:
            share = 100 * (end / lowest[1] - 1)
            rose.append(f"{run.label} by {share:.0f} % since step {lowest[0]:,}")
    if rose:
        return (
            f"Held-out cross entropy rose again: {', '.join(rose)}. Under sft that is "
            "over-fitting: stop there, or lower the rate. A weighted loss lets it rise for tokens "
            "that the model holds to be unlikely; look at the accuracy."
        )
    if any(run.figures.get(CROSS_ENTROPY + HELD_OUT) for run in runs):
        return "No run's held-out cross entropy is more than 1 % above its own lowest."
    return "No run was evaluated, so over-fitting would not show here."


def confidence(runs: Sequence[Run]) -> str:
    parts = []
    if found := _ends(runs, PROB):
        parts.append(f"The mean probability of the target tokens ended at {_span(found)}")
    if found := _ends(runs, ACCURACY):
        parts.append(f"greedy decoding takes the target for a share of {_span(found)}")
    text = "; ".join(parts) + "." if parts else "No probability was logged."
    low = {label: p for label, p in _ends(runs, END_PROB).items() if p < _LOW_END}
    if low:
        text += (
            f" End tokens have a mean probability below {_LOW_END:g}: {_span(low)}; these models "
            "will often not stop by themselves (--dft-full-weight end)."
        )
    return text


def by_rate(runs: Sequence[Run]) -> str:
    parts = []
    for name, members in groups_by_rate(runs).items():
        ends = [(last(held_out(run, CROSS_ENTROPY)[1]), rate) for rate, run in members]
        known = [(value, rate) for value, rate in ends if value is not None]
        if len(known) < 2:
            continue
        value, rate = min(known)
        rates = [r for _, r in known]
        text = f"{name}: {number(value)} at {rate:g}"
        if rate == max(rates):
            text += ", the largest rate tried: try a larger one"
        elif rate == min(rates):
            text += ", the smallest rate tried: try a smaller one"
        parts.append(text)
    return f"Lowest cross entropy at the end, {'; '.join(parts)}." if parts else ""


def optimizer(runs: Sequence[Run]) -> str:
    spikes = []
    for run in runs:
        norms = sorted(run.figures.get(GRAD_NORM, {}).values())
        if norms and norms[-1] > _SPIKE * norms[len(norms) // 2] > 0:
            spikes.append(f"{run.label} {norms[-1] / norms[len(norms) // 2]:.0f} times")
    if spikes:
        return (
            f"The largest gradient norm stands far above the median: {', '.join(spikes)}. Clipping "
            "took the length; a lower rate or a longer warm-up takes the cause."
        )
    return f"No gradient norm was more than {_SPIKE:g} times its run's median."
