"""How often a run trains on each conversation of an item; and when that is too often.

Repeated data is worth as much as new data for about four epochs and then quickly less (Muennighoff
et al., "Scaling Data-Constrained Language Models", arXiv 2305.16264, section 6).
"""

from __future__ import annotations

from megatron_dft.data.dataset import ChatDataset

MANY = 4


def repeats(data: ChatDataset) -> tuple[float, dict[str, float]]:
    """(epochs of the run, name of an item → how often each of its conversations comes, on
    average)."""
    epochs = data.plan.epochs()
    sizes, drawn = data.conversations.sizes(), data.plan.source_counts()
    return epochs, {
        name: epochs * count / size
        for name, size, count in zip(data.sources, sizes, drawn, strict=True)
        if size
    }


def said(data: ChatDataset) -> str:
    """The epochs of the run, and of several items how often each is repeated."""
    epochs, found = repeats(data)
    text = f"{epochs:.3g} epochs"
    if len(found) > 1:
        text += "; each conversation of " + ", ".join(
            f"{name} {times:.3g} times" for name, times in found.items()
        )
    return text


def warnings(data: ChatDataset) -> list[str]:
    """A line for each item that is repeated too often."""
    _, found = repeats(data)
    sizes = dict(zip(data.sources, data.conversations.sizes(), strict=True))
    return [
        f"{name}: each of its {sizes[name]:,} conversations is trained on {times:,.0f} times, and "
        f"above {MANY} repeats a model learns them by heart; train fewer steps, or lower its share "
        "or epochs (cap=N bounds it)"
        for name, times in found.items()
        if times > MANY
    ]
