"""Tokens a second of a layout, estimated from the model's arithmetic and the links' speeds.

A step is, on every replica, its micro-batches one after another through the pipeline, then what of
the exchange of gradients and weights does not hide behind the last backward and the first forward.

| part | seconds |
|---|---|
| matrices | 6 flops a parameter and token (8 with --recompute), 6·h·s a layer for causal attention, at `FLOPS` |
| launches | `KERNELS` a layer and micro-batch, `LAUNCH` each, not hidden: what small models wait for |
| cross entropy | `LOGIT_BYTES` a logit through the GPU's memory; 3 products more a chunked one |
| TP | 8 transfers a layer of the row's hidden states by NVLink, not hidden |
| CP | keys and values 3 times round the ring, not hidden |
| EP | tokens to experts and back, forward and backward, 4 transfers of top_k rows |
| DP | fp32 gradients scattered, bf16 weights gathered |
| PP | waiting: (PP − 1) / micro-batches of the above |

Measured on one H200 (Qwen2.5-1.5B, 4 rows of 4,096 tokens, 630 ms a step, 26,000 tokens/s, 30 % of the
matrix units): 600 TFLOPS in the products, 58 bytes a logit, and LAUNCH is what the rest of that step
comes to. The links' speeds are NVIDIA's, taken at 80 %; no step on several GPUs was measured. An
estimate is good for the order of layouts, not for a deadline.
"""  # noqa: E501

from dataclasses import dataclass

from megatron_dft.cluster.memory import Job, Layout
from megatron_dft.cluster.model_shape import Shape

FLOPS = 6.0e14
LOGIT_BYTES = 58.0
KERNELS, LAUNCH = 200, 13.0e-6
REACHED = 0.8  # of a link's published speed


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: gigabytes, and bytes a second of its memory and of its NVLink (one way)."""

    gigabytes: float
    memory: float
    nvlink: float = 450e9


# An H100 does the same arithmetic at 0.7 of the H200's memory bandwidth.
GPUS = {"h100": Gpu(80.0, 2.45e12), "h200": Gpu(141.0, 3.5e12)}
NODE_LINK = 50e9  # bytes a second and GPU between nodes: one 400 Gb/s adapter each


@dataclass(frozen=True)
class Cluster:
    """What a layout runs on; `node_link` in bytes a second and GPU, one way."""

    gpu: Gpu
    gpus_per_node: int = 8
    node_link: float = NODE_LINK

    def link(self, ranks: int) -> float:
        """Bytes a second that so many neighbouring ranks reach."""
        inside = ranks <= self.gpus_per_node
        return REACHED * (self.gpu.nvlink if inside else self.node_link)


def leaves_node(layout: Layout, gpus_per_node: int) -> bool:
    """Whether a context- or expert-parallel group spans nodes (ranks: TP first, then CP or EP)."""
    context = layout.context > 1 and layout.tensor * layout.context > gpus_per_node
    return context or layout.expert > gpus_per_node


def _layer_flops(shape: Shape, job: Job, layout: Layout) -> tuple[float, float]:
    """(forward flops of one layer and micro-batch on a rank, of the output layer)."""
    tokens = job.seq_length / layout.context
    matrices = shape.attention(1)
    if shape.experts:
        active = shape.top_k * shape.expert_ffn + shape.shared
        matrices += shape.mlp(active, 1) + shape.hidden * shape.experts
    else:
        matrices += shape.mlp(shape.ffn, 1)
    attention = 2 * shape.heads * shape.head_dim * job.seq_length
    layer = tokens * (2 * matrices + attention) / layout.tensor
    vocab = shape.padded_vocab(layout.tensor, job.vocab_multiple) / layout.tensor
    return layer, 2 * tokens * vocab * shape.hidden


def _exchanges(shape: Shape, job: Job, layout: Layout, on: Cluster) -> float:
    """Seconds of communication of one layer and micro-batch, forward and backward."""
    t, c, e = layout.tensor, layout.context, layout.expert
    tokens, seconds = job.seq_length / c, 0.0
    if t > 1:
        seconds += 8 * tokens * shape.hidden * 2 * (t - 1) / t / on.link(t)
    if c > 1:
        pairs = 2 * shape.kv_heads * shape.head_dim / t
        seconds += 3 * (c - 1) * tokens * pairs * 2 / on.link(t * c)
    if e > 1:
        rows = tokens / t * shape.top_k
        seconds += 4 * rows * shape.hidden * 2 * (e - 1) / e / on.link(e)
    return seconds


def _head(shape: Shape, job: Job, layout: Layout, on: Cluster, flops: float) -> float:
    """Seconds of output layer and loss of one micro-batch on the last stage."""
    products = (4 if job.chunk is not None else 3) * flops / FLOPS
    logits = flops / (2 * shape.hidden)
    seconds = products + LOGIT_BYTES * logits / on.gpu.memory
    return 2 * seconds if job.kl else seconds


def step_seconds(shape: Shape, job: Job, layout: Layout, on: Cluster) -> float:
    """Seconds of one optimizer step."""
    layers = shape.layers / layout.pipeline
    layer, output = _layer_flops(shape, job, layout)
    forward = layers * (layer / FLOPS)
    passes = 4 if job.recompute else 3
    stage = passes * forward + layers * KERNELS * LAUNCH
    stage += layers * _exchanges(shape, job, layout, on)
    if job.reference:
        stage += forward
    micro = stage + _head(shape, job, layout, on, output)  # the last stage is the slowest
    count = job.micro_batches(layout)
    return micro * (count + layout.pipeline - 1) + _replicas(shape, job, layout, on, forward)


def _replicas(shape: Shape, job: Job, layout: Layout, on: Cluster, forward: float) -> float:
    """Seconds of the gradients' and weights' exchange that stay visible, and of the optimizer."""
    dense, expert = shape.stage(
        layout.tensor, layout.pipeline, layout.expert, 0, job.vocab_multiple
    )
    shards = layout.data * layout.context
    link = on.link(layout.tensor * shards)
    seen = 0.0
    if shards > 1:
        part = (shards - 1) / shards
        seen += max(0.0, 4 * (dense + expert) * part / link - 2 * forward)
        seen += max(0.0, 2 * (dense + expert) * part / link - forward)
    # Adam reads and writes its moments, the master weight and the gradient once.
    return seen + 32 * (dense + expert) / shards / on.gpu.memory


def tokens_per_second(shape: Shape, job: Job, layout: Layout, on: Cluster) -> float:
    """Of the whole job, padding included."""
    return job.global_batch * job.seq_length / step_seconds(shape, job, layout, on)
