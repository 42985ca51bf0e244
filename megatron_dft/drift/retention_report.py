"""The retention half of a report: what the tuned models still say as the base does."""

from typing import Any

from megatron_dft.drift import style
from megatron_dft.drift.labels import model_name
from megatron_dft.drift.page import Picture, Section, Table, number

FIELDS = (
    "tokens",
    "base_perplexity",
    "perplexity",
    "kl",
    "kl_error",
    "reverse_kl",
    "kl_sequence",
    "top1_agreement",
)
SAMPLED = "task, base's answers"  # the text on which the KL is the published one
Report = dict[str, Any]


def _picture(report: Report) -> bytes:
    labels, texts = list(report["methods"]), list(report["texts"])
    name = style.plain(model_name(report["base"]))
    panels = (
        ("perplexity", "Perplexity"),
        ("kl", f"KL({name} ‖ tuned), nats a token"),
        ("top1_agreement", f"Top-1 agreement with {name}"),
    )
    picture, axes = style.figure(1, 2.6 * len(panels) + 0.6, len(panels))
    width = 0.8 / len(labels)
    for ax, (field, title) in zip(axes, panels, strict=True):
        for i, label in enumerate(labels):
            places = [x + (i - (len(labels) - 1) / 2) * width for x in range(len(texts))]
            found = [report["methods"][label][t] for t in texts]
            errors = [1.96 * (row["kl_error"] or 0) for row in found] if field == "kl" else None
            values = [row[field] for row in found]
            ax.bar(
                places,
                values,
                width,
                yerr=errors,
                capsize=2,
                label=style.plain(label),
                **style.bar(i),
            )
        if field == "perplexity":
            for x, text in enumerate(texts):
                level = report["methods"][labels[0]][text]["base_perplexity"]
                ax.plot([x - 0.45, x + 0.45], [level] * 2, "--", color=style.INK, lw=1.2)
        ax.set_xticks(range(len(texts)), [style.plain(t) for t in texts])
        ax.set(title=title)
        ax.set_ylim(bottom=0)
        ax.grid(False, axis="x")
    style.legend(picture, axes[0])
    return style.png(picture)


def _span(values: dict[str, float], words: str) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    if low == high:
        return f"{words.format(number(values[low]))} ({low})"
    return (
        f"{words.format(number(values[low]))} ({low}) to {words.format(number(values[high]))} "
        f"({high})"
    )


def _on(report: Report, text: str, field: str) -> dict[str, float]:
    return {label: found[text][field] for label, found in report["methods"].items()}


def conclusion(report: Report) -> str:
    """What was kept, and what the KL on the task says of it."""
    parts = []
    texts = report["texts"]
    if "general" in texts:
        base = next(iter(report["methods"].values()))["general"]["base_perplexity"]
        change = {
            k: round(100 * (v / base - 1), 1)
            for k, v in _on(report, "general", "perplexity").items()
        }
        worse = [k for k, v in change.items() if v > 1]
        parts.append(
            f"The perplexity of general text changed by {_span(change, '{} %')}; "
            + (f"{', '.join(worse)} lost more than 1 %." if worse else "none lost more than 1 %.")
        )
    task = next((t for t in (SAMPLED, "task") if t in texts), None)
    if task is not None:
        kl = _on(report, task, "kl")
        text = f"On the {task} the KL from the base is {_span(kl, '{}')} nats a token"
        if len(set(kl.values())) > 1:
            order = sorted(kl, key=kl.__getitem__)
            text += f"; by arXiv 2509.04259 {order[0]} should have forgotten least"
            if "general" in texts:
                lost = _on(report, "general", "perplexity")
                least = min(lost, key=lost.__getitem__)
                agrees = least == order[0]
                text += ", as it did" if agrees else f", but {least} lost least on general text"
        parts.append(text + ".")
        if task != SAMPLED:
            parts.append(
                "These are the demonstrations' tokens; --task-samples measures it where that paper "
                "did, on the base's own answers."
            )
    return " ".join(parts)


def sections(report: Report) -> list[Section]:
    rows = [
        [label, text, *(values[f] for f in FIELDS)]
        for label, texts in report["methods"].items()
        for text, values in texts.items()
    ]
    return [
        Section(
            f"Retention: what {model_name(report['base'])} said before",
            [
                "Held-out text under both models. kl is KL(base ‖ tuned) over the whole "
                "vocabulary, the mean over tokens in nats, kl_error its standard error over the "
                "texts (bars: 95 %), reverse_kl KL(tuned ‖ base), kl_sequence the mean over texts "
                "of the KL summed over a text's tokens; top1_agreement the share of positions "
                "where both would say the same next token. Dashed: the base's perplexity.",
                *report.get("notes", ()),
            ],
            [Picture("retention.png", _picture(report), "")],
            [Table(("method", "text", *FIELDS), rows)],
            meaning=conclusion(report),
        )
    ]
