"""Hidden states → per-token loss through the output layer, without the [tokens, vocab] logits.

Route 2 of the loss, for any training loop: tensor parallel, sequence parallel, supervised tokens
only, any objective of the registry, KL to a reference model. Three designs, one mathematics:

- `keep` (kernels/keep.py): on a GPU. Logits in blocks of the vocabulary; what fits in memory is
  kept for the backward. Three products of hidden × vocabulary size where all of it fits.
- `linear_recompute`: the same in torch's own operations, and nothing is kept. Four products; any
  upstream gradient, any objective, any number of ranks.
- `linear_forward`: the gradient is taken in the forward, three products. Only where the weights are
  known chunk by chunk: one tensor-parallel rank, an objective that looks at single tokens, and fp32
  or fp64 (with bf16 it would need an fp32 copy of dW to sum the chunks in).

`design="auto"` takes the first where the kernels serve, else the third where it may.

>>> hidden, weight = torch.randn(5, 1, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
>>> labels = torch.tensor([[1, 2, 3, 4, 5]])
>>> out = linear_head_loss(hidden, weight, labels, mask=labels > 2, objective="dft")
>>> out.loss.shape, (out.weight == out.log_prob.exp())[labels > 2].all()
(torch.Size([1, 5]), tensor(True))
>>> (out.loss.sum() / 3).backward()
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses import kernels, registry
from megatron_dft.losses.linear_forward import LinearLoss
from megatron_dft.losses.linear_recompute import Head, LinearStatistics
from megatron_dft.losses.linear_reference import ReferenceLogits
from megatron_dft.losses.linear_shapes import (
    Layout,
    check_reference,
    check_weight,
    memory_limits,
    pick_design,
)
from megatron_dft.losses.row_filter import RowFilter
from megatron_dft.losses.supervised_rows import SupervisedRows, on_device
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_autograd import world_size
from megatron_dft.losses.vocab_parallel import TOP_K
from megatron_dft.losses.vocab_statistics import Wanted
from megatron_dft.losses.weighting import Objective


class LinearHeadOutput(NamedTuple):
    """[b, s] or [T] like the labels, fp32 (fp64 for fp64 hidden states), 0 where not supervised.

    loss: per token, not reduced, differentiable. weight: detached ∂loss/∂(−log p). log_prob:
    detached log p of the target; −log_prob is the plain cross entropy. is_top1: bool, whether
    greedy decoding takes the target; its mean over supervised tokens is the accuracy. kl:
    KL(reference ‖ model) where a reference was given, differentiable.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    is_top1: Tensor
    kl: Tensor | None = None


def linear_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective | str,
    batch_first: bool = False,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int | None = None,
    loss_memory: int | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    stats: dict | None = None,
    reference_logits: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    row_filter: RowFilter | None = None,
    fuse_main_grad: bool = False,
    design: str = "auto",
) -> LinearHeadOutput:
    """Loss of the output layer hidden @ weight.T under an objective, with exact d_hidden and dW.

    Args:
        hidden: [s, b, h] per rank, s divided by the group's size with sequence_parallel; or [T, h].
            bf16, fp16, fp32 or fp64. What Megatron hands to its output layer. Not changed.
            hidden[t] is the state that predicts labels[t].
        weight: [V, h], this rank's rows of the output layer, of hidden's dtype. Its gradient is
            returned through autograd in the same dtype (but see fuse_main_grad).
        labels: [b, s], also with [s, b, h], or [T]: int64 ids in the whole vocabulary, shifted
            already, the same on all ranks of the group (not divided under sequence parallelism).
        objective: of registry.get, or its name, "dft", with the registry's defaults.
        batch_first: hidden (and reference_hidden, reference_logits) are [b, s, h], as transformers
            has them. Not guessed: where b = s the shapes do not tell. Without meaning for [T, h].
        mask: like labels, non-zero where supervised. None: labels other than −100 are. In host
            memory it spares the one time that the host waits for the GPU.
        group: the tensor-parallel group; None: one rank holds the whole vocabulary.
        chunk_size: [tokens] at most chunk_size × V logits exist at a time (128 · n, n supervised
            tokens, are the least on a GPU). None: as many as loss_memory allows.
        loss_memory: [bytes] for logits, and for the fp32 sum of d_hidden where they do not all fit.
            None: 1 GiB on a GPU, 256 tokens' logits elsewhere.
        vocab_start: id of weight's first row; None: equal shards in rank order.
        vocab_size: number of real tokens; rows of weight from it on are padding, take no
            probability and get a zero gradient. None: every row is real.
        stats: further fields of `TokenStats` ([b, s] or [T] tensors like reference_log_prob and
            segment_ids; num_segments; process groups).
        reference_logits: [s, b, V] or [T, V] (not divided under sequence parallelism), or in their
            place reference_hidden, like hidden, and reference_weight, like weight: asks for
            KL(reference ‖ model). Constant.
        row_filter: leaves rows of no gradient out of the backward, within its bound.
        fuse_main_grad: dW is added to `weight.main_grad` (fp32) where the weight has one, as
            Megatron's gradient accumulation fusion does; main_grad.py.
        design: "auto", "keep", "recompute" or "forward", see the top.

    bf16 and fp16 logits of the `keep` design are rounded, all but the target's, which is an fp32
    dot product, in the value and in the gradient alike.

    Collectives over `group`: one all-gather of a few floats per supervised token, one all-reduce of
    d_hidden's supervised rows; with sequence parallelism an all-gather of the hidden states in
    each direction and one reduce-scatter instead.

    Raises ValueError where shapes do not fit or the design cannot serve the objective.
    """
    stats = dict(stats or {})
    objective = registry.named(objective)
    ranks = world_size(group)
    sequence_parallel = sequence_parallel and ranks > 1
    layout = Layout.of(hidden, labels, ranks if sequence_parallel else 1, batch_first)
    check_weight(hidden, weight)
    for name, values in {**stats, "mask": mask}.items():
        if isinstance(values, Tensor):
            layout.check_like_labels(name, values)
    wants_kl = reference_logits is not None or reference_hidden is not None
    check_reference(
        objective, layout, hidden, weight, reference_logits, reference_hidden, reference_weight
    )
    if row_filter is not None and wants_kl:
        raise ValueError(
            "--loss-row-filter: its bound is that of a loss in log p alone, got a KL term; leave "
            "one of the two out"
        )
    design = pick_design(
        design, hidden, weight, objective, ranks, kernels.serve(hidden), wants_kl, row_filter
    )
    supervised = (labels != -100) if mask is None else mask.to(torch.bool)
    if vocab_start is None:
        vocab_start = 0 if group is None else dist.get_rank(group) * len(weight)
    real = len(weight)
    if vocab_size is not None:
        real = min(max(vocab_size - vocab_start, 0), real)
    most_logits, memory = memory_limits(chunk_size, loss_memory, real, hidden, design)
    rows = SupervisedRows(layout.tokens(supervised), group, sequence_parallel, hidden.device)
    head = Head(
        rows=rows,
        group=group,
        want=Wanted(
            entropy="entropy" in objective.needs,
            sum_sq_prob="sum_sq_prob" in objective.needs,
            top_k=TOP_K if "entropy_top20" in objective.needs else 0,
            kl=wants_kl,
            reference_share=objective.reference_share,
        ),
        vocab_start=vocab_start,
        real=real,
        most_logits=most_logits,
        memory=memory,
        fuse_main_grad=fuse_main_grad,
        row_filter=row_filter,
        reference=None
        if not wants_kl
        else ReferenceLogits(
            rows,
            None if reference_logits is None else layout.rows(reference_logits.detach()),
            None if reference_hidden is None else layout.rows(reference_hidden.detach()),
            None if reference_weight is None else reference_weight.detach(),
        ),
    )
    arguments = (layout.rows(hidden), weight, layout.tokens(labels), head)
    if design == "forward":
        per_token = {k: layout.tokens(v) for k, v in stats.items() if isinstance(v, Tensor)}
        per_token.pop("segment_ids", None)
        outputs = LinearLoss.apply(*arguments, objective, per_token)
        return LinearHeadOutput(*(layout.like_labels(x) for x in outputs))
    outputs = _statistics(design).apply(*arguments)
    shaped = [None if x is None else layout.like_labels(x) for x in outputs]
    log_prob, is_top1 = shaped[0], shaped[1]
    entropy, entropy_top20, sum_sq_prob, kl = shaped[2:]
    assert log_prob is not None and is_top1 is not None
    found: dict[str, Any] = {
        "entropy": entropy, "entropy_top20": entropy_top20, "sum_sq_prob": sum_sq_prob
    }  # fmt: skip
    if "kl" in objective.needs:
        found["kl"] = kl
    loss, token_weight = objective(
        TokenStats(log_prob=log_prob, mask=on_device(supervised, hidden.device), **found | stats)
    )
    return LinearHeadOutput(loss, token_weight, log_prob.detach(), is_top1, kl)


def _statistics(design: str) -> type[torch.autograd.Function]:
    if design != "keep":
        return LinearStatistics
    from megatron_dft.losses.kernels.keep import KeptStatistics  # imports Triton

    return KeptStatistics
