"""The retention half of a report: what the tuned models still say as the base does."""

from typing import Any

from megatron_dft.drift import plots
from megatron_dft.drift.page import Picture, Section, Table

FIELDS = ("tokens", "base_perplexity", "perplexity", "kl", "top1_agreement")


def _picture(report: dict[str, Any]) -> bytes:
    picture, axes = plots.figure(3)
    labels = list(report["methods"])
    texts = list(report["texts"])
    panels = (
        ("perplexity", "Perplexity"),
        ("kl", "KL(base ‖ tuned), nats a token"),
        ("top1_agreement", "Top-1 agreement with the base"),
    )
    for ax, (field, title) in zip(axes, panels, strict=True):
        width = 0.8 / len(labels)
        for i, label in enumerate(labels):
            places = [x + (i - (len(labels) - 1) / 2) * width for x in range(len(texts))]
            values = [report["methods"][label][t][field] for t in texts]
            ax.bar(places, values, width, color=plots.colour(i), label=plots.plain(label))
        if field == "perplexity":
            for x, text in enumerate(texts):
                level = report["methods"][labels[0]][text]["base_perplexity"]
                ax.plot([x - 0.45, x + 0.45], [level] * 2, "--", color="#1c2430", lw=1.2)
        ax.set_xticks(range(len(texts)), [plots.plain(t) for t in texts])
        ax.set(title=title)
    axes[0].legend(frameon=False, fontsize=8)
    return plots.png(picture)


def sections(report: dict[str, Any]) -> list[Section]:
    rows = [
        [label, text, *(values[f] for f in FIELDS)]
        for label, texts in report["methods"].items()
        for text, values in texts.items()
    ]
    return [
        Section(
            "Retention",
            [
                "Held-out text under both models. KL(base ‖ tuned) is the mean over tokens, in "
                "nats, over the whole vocabulary; top-1 agreement the share of positions where "
                "both would say the same next token. Dashed: the base's perplexity.",
                *report.get("notes", ()),
            ],
            [Picture("retention.png", _picture(report), "")],
            [Table(("method", "text", *FIELDS), rows)],
        )
    ]
