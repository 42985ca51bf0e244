"""Memory of one GPU under a layout: weights, gradients, optimizer, activations, logits.

| part | bytes |
|---|---|
| weights | 2 a parameter (bf16), 4 in fp32 |
| gradients | 4 a parameter: Megatron accumulates them in fp32 |
| optimizer | 12 a parameter (fp32 master weight and Adam's moments), 8 in fp32; over DP × CP ranks with --use-distributed-optimizer |
| activations | per layer and token 8h + 4·(query + key-value width) + 6·ffn: what a layer keeps for its backward with flash attention and a gated MLP; over TP with --sequence-parallel, over CP; the first stage holds PP micro-batches at once |
| reference | 2 a parameter (bf16), 4 in fp32: the frozen model of iw-sft, psft, asft and --kl-coeff, in the same layout |
| logits | 10 a logit in Megatron's cross entropy (bf16, fp32, softmax); with --loss-chunk-size one chunk's, and 4 a token and hidden unit for the sum of their gradients; twice the logits where a KL compares two distributions |
| reserve | 6 GB: CUDA context, NCCL buffers, fragmentation |

The activation formula is Korthikanti et al. (arXiv 2205.05198, section 4) with its parts by name; it
gives their 34·h for Llama's proportions.
"""  # noqa: E501

import dataclasses
from dataclasses import dataclass

from megatron_dft.cluster.model_shape import Shape

# CUDA context, NCCL buffers and fragmentation, seen to take 4 to 6 GB on an H100.
RESERVE = 6e9


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; `expert` is 1 for a dense model."""

    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class Job:
    """What is trained: tokens of a row, rows of a step, precision and the loss route."""

    seq_length: int
    global_batch: int
    bf16: bool = True
    recompute: bool = False
    chunk: int | None = None
    distributed_optimizer: bool = True
    reference: bool = False
    kl: bool = False
    vocab_multiple: int = 128

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a step on one replica, one row each."""
        return self.global_batch // layout.data


@dataclass(frozen=True)
class Bytes:
    """Bytes on the fullest GPU."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def gigabytes(self) -> dict[str, float]:
        """The parts in 10⁹ bytes, each rounded to 0.1, and their `sum`: it adds up as printed."""
        parts = {name: round(v / 1e9, 1) for name, v in dataclasses.asdict(self).items()}
        return parts | {"sum": round(sum(parts.values()), 1)}


def states(shape: Shape, job: Job, layout: Layout, stage: int) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer) of a rank on pipeline stage `stage`."""
    dense, expert = shape.stage(
        layout.tensor, layout.pipeline, layout.expert, stage, job.vocab_multiple
    )
    count = dense + expert
    shards = layout.data * layout.context if job.distributed_optimizer else 1
    expert_shards = 1
    if job.distributed_optimizer:
        expert_shards = layout.world // (layout.pipeline * layout.expert)
    each = 12 if job.bf16 else 8
    optimizer = each * (dense / shards + expert / max(expert_shards, 1))
    return (2 if job.bf16 else 4) * count, 4 * count, optimizer


def _activations(shape: Shape, job: Job, layout: Layout, stage: int) -> float:
    h, d = shape.hidden, shape.head_dim
    tokens = job.seq_length / layout.context
    width = 1 if job.bf16 else 2
    attention = 8 * h + 4 * (shape.heads + shape.kv_heads) * d
    if shape.experts:
        # A token goes through top_k experts, and is copied to each and back.
        mlp = shape.top_k * (6 * shape.expert_ffn + 4 * h) + 6 * shape.shared
    else:
        mlp = 6 * shape.ffn
    layer = width * tokens * (attention + mlp) / layout.tensor
    layers = shape.layers // layout.pipeline
    alive = min(layout.pipeline - stage, job.micro_batches(layout))
    if not job.recompute:
        return alive * layers * layer
    return alive * layers * width * tokens * 2 * h / layout.tensor + layer


def _logits(shape: Shape, job: Job, layout: Layout) -> float:
    tokens = job.seq_length / layout.context
    sums = 0.0
    if job.chunk is not None:
        sums = 4 * tokens * shape.hidden
        tokens = min(tokens, job.chunk)
    vocab = shape.padded_vocab(layout.tensor, job.vocab_multiple) / layout.tensor
    return 10 * tokens * vocab * (2 if job.kl else 1) + sums


def fullest(shape: Shape, job: Job, layout: Layout) -> Bytes:
    """The fullest rank's memory; the first and the last pipeline stage are the candidates."""
    found = []
    for stage in {0, layout.pipeline - 1}:
        weights, gradients, optimizer = states(shape, job, layout, stage)
        last = stage == layout.pipeline - 1
        found.append(
            Bytes(
                weights,
                gradients,
                optimizer,
                weights if job.reference else 0.0,
                _activations(shape, job, layout, stage),
                _logits(shape, job, layout) if last else 0.0,
            )
        )
    return max(found, key=lambda bytes_: bytes_.total)


def bubble(layout: Layout, job: Job) -> float:
    """Share of a step that a GPU waits in the 1F1B pipeline: (PP − 1) / (m + PP − 1)."""
    waiting = layout.pipeline - 1
    return waiting / (job.micro_batches(layout) + waiting)
