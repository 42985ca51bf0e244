"""Layouts that divide, each with its memory and speed, the best first, and tables of them."""

import math
from dataclasses import dataclass

from megatron_dft.cluster import layouts, memory, speed
from megatron_dft.cluster.memory import Bytes, Job, Layout
from megatron_dft.cluster.model_shape import Shape

FULL = 0.92  # of a GPU's memory: beyond it a longer row or a fragment ends the run
_ALIKE = 0.05  # relative
_SIZES = ("TP", "PP", "CP", "EP", "DP")
_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "reference": "ref",
    "activations": "activ",
    "logits": "logits",
    "reserve": "reserve",
    "sum": "sum GB",
}


@dataclass(frozen=True)
class Row:
    """One layout: bytes on its fullest GPU, tokens a second of the job."""

    layout: Layout
    size: Bytes
    tokens_per_second: float

    def share(self, gigabytes: float) -> float:
        """Of a GPU's memory, as the table's sum has it."""
        return self.size.gigabytes()["sum"] / gigabytes


def ranked(shape: Shape, job: Job, nodes: int, on: speed.Cluster, gigabytes: float) -> list[Row]:
    """Every layout that divides, whether it fits or not.

    The fastest first, of those within 5 % the one with fewer splits; but behind them those over
    `FULL` of the memory, and among equally full ones those whose context or experts leave the node.
    """
    rows = [
        Row(
            layout,
            memory.fullest(shape, job, layout),
            speed.tokens_per_second(shape, job, layout, on),
        )
        for layout in layouts.dividing(shape, job, nodes, on.gpus_per_node)
    ]
    return sorted(
        rows,
        key=lambda row: (
            row.share(gigabytes) > 1,
            row.share(gigabytes) > FULL,
            speed.leaves_node(row.layout, on.gpus_per_node),
            # Nearer to each other than the estimate is to the truth: the simpler one first.
            -round(math.log(row.tokens_per_second) / _ALIKE),
            row.layout.pipeline,
            row.layout.context,
            row.layout.tensor,
            -row.tokens_per_second,
        ),
    )


def table(rows: list[Row], job: Job, gigabytes: float) -> list[str]:
    """Lines of the table; the columns between `bubble` and `sum GB` add up to it."""
    head = [f"{word:>8}" for word in (*_SIZES, "micro", "bubble", *_PARTS.values(), "  tokens/s")]
    lines = ["".join(head)]
    for row in rows:
        at = row.layout
        whole = (at.tensor, at.pipeline, at.context, at.expert, at.data, job.micro_batches(at))
        parts = row.size.gigabytes()
        mark = "  does not fit" if row.share(gigabytes) > 1 else ""
        if not mark and row.share(gigabytes) > FULL:
            mark = f"  over {FULL:.0%}"
        lines.append(
            "".join(f"{n:8d}" for n in whole)
            + f"{memory.bubble(at, job):8.1%}"
            + "".join(f"{parts[name]:8.1f}" for name in _PARTS)
            + f"{row.tokens_per_second:10,.0f}"
            + mark
        )
    return lines


def sentence(row: Row, job: Job, gigabytes: float) -> str:
    """A layout's memory and speed in words, as a configuration's comment has them."""
    parts = row.size.gigabytes()
    words = [f"{name} {parts[name]:.1f}" for name in _PARTS if name != "sum" and parts[name]]
    text = f"GB a GPU: {', '.join(words)}; sum {parts['sum']:.1f} of {gigabytes:g}."
    if bubble := memory.bubble(row.layout, job):
        text += f" Pipeline bubble {bubble:.0%}."
    return f"{text} About {float(f'{row.tokens_per_second:.2g}'):,.0f} tokens/s (estimate)."
