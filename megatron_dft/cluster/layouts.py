"""Which parallel layouts divide a model, a batch and a cluster."""

from collections.abc import Iterator

from megatron_dft.cluster.memory import Job, Layout
from megatron_dft.cluster.model_shape import Shape


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]


def why_not(shape: Shape, job: Job, layout: Layout, gpus_per_node: int) -> str | None:
    """Why this layout does not divide, in words; None if it does."""
    t, p, c = layout.tensor, layout.pipeline, layout.context
    if t > gpus_per_node:
        return f"TP {t} would leave the node ({gpus_per_node} GPUs)"
    if shape.heads % t or shape.kv_heads % t:
        return f"TP {t} does not divide {shape.heads} heads and {shape.kv_heads} key-value heads"
    if shape.ffn % t:
        return f"TP {t} does not divide the MLP width {shape.ffn}"
    if shape.layers % p:
        return f"PP {p} does not divide {shape.layers} layers"
    if c > 1 and job.seq_length % (2 * c * t):
        return f"CP {c} needs --seq-length to be a multiple of {2 * c * t}"
    if t > 1 and job.seq_length % t:
        return f"sequence parallelism needs --seq-length to be a multiple of {t}"
    if job.global_batch % layout.data:
        return f"DP {layout.data} does not divide the batch of {job.global_batch} rows"
    if layout.expert > 1:
        if not shape.experts or shape.experts % layout.expert:
            return f"EP {layout.expert} does not divide {shape.experts} experts"
        if (layout.world // p) % layout.expert:
            return f"EP {layout.expert} does not divide the {layout.world // p} ranks of a stage"
    return None


def dividing(shape: Shape, job: Job, nodes: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout of the cluster that divides."""
    world = nodes * gpus_per_node
    for t in _powers(gpus_per_node):
        for p in (n for n in range(1, shape.layers + 1) if world % (t * n) == 0):
            for c in _powers(world // (t * p)):
                if world % (t * p * c):
                    continue
                for e in _powers(shape.experts) if shape.experts else [1]:
                    layout = Layout(t, p, c, world // (t * p * c), e)
                    if why_not(shape, job, layout, gpus_per_node) is None:
                        yield layout
