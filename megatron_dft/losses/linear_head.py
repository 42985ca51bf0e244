"""Hidden states → per-token loss through the output layer, without the [tokens, vocab] logits.

Route 2 of the loss, for any training loop: tensor parallel, sequence parallel, supervised tokens
only, any objective of the registry but those that need a KL term. Two designs, one mathematics:

- `linear_recompute`: logits in blocks of the vocabulary, recomputed in the backward. Four products
  of hidden × vocabulary size; any upstream gradient, any objective, any number of ranks.
- `linear_forward`: the gradient is taken in the forward, three products. Only where the weights are
  known chunk by chunk: one tensor-parallel rank, an objective that looks at single tokens, and fp32
  or fp64 (with bf16 it would need an fp32 copy of dW to sum the chunks in).

`design="auto"` takes the second where it may.

>>> from megatron_dft.losses import registry
>>> hidden, weight = torch.randn(5, 1, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
>>> labels = torch.tensor([[1, 2, 3, 4, 5]])
>>> out = linear_head_loss(hidden, weight, labels, mask=labels > 2, objective=registry.get("dft"))
>>> out.loss.shape, (out.weight == out.log_prob.exp())[labels > 2].all()
(torch.Size([1, 5]), tensor(True))
>>> (out.loss.sum() / 3).backward()
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.linear_forward import LinearLoss
from megatron_dft.losses.linear_recompute import Head, LinearStatistics
from megatron_dft.losses.supervised_rows import SupervisedRows
from megatron_dft.losses.token_stats import TokenStats
from megatron_dft.losses.vocab_autograd import world_size
from megatron_dft.losses.vocab_parallel import TOP_K
from megatron_dft.losses.vocab_statistics import Wanted
from megatron_dft.losses.weighting import Objective

DESIGNS = ("auto", "recompute", "forward")


class LinearHeadOutput(NamedTuple):
    """[b, s] or [T] like the labels, fp32 (fp64 for fp64 hidden states), 0 where not supervised.

    loss: per token, not reduced, differentiable. weight: detached ∂loss/∂(−log p). log_prob:
    detached log p of the target; −log_prob is the plain cross entropy. is_top1: bool, whether
    greedy decoding takes the target; its mean over supervised tokens is the accuracy.
    """

    loss: Tensor
    weight: Tensor
    log_prob: Tensor
    is_top1: Tensor


def _layout(hidden: Tensor, labels: Tensor, ranks: int) -> None:
    """ValueError unless hidden [N, h] goes with labels [T] or [s, b, h] with [b, s]."""
    expected = labels.shape if labels.dim() == 1 else (labels.shape[1], labels.shape[0])
    expected = (expected[0] // ranks, *expected[1:])
    if hidden.shape[:-1] != torch.Size(expected) or labels.dim() > 2:
        raise ValueError(
            f"hidden: expected the shape {(*expected, hidden.shape[-1])} for labels of shape "
            f"{tuple(labels.shape)}, got {tuple(hidden.shape)}"
        )


def linear_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = 256,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    stats: dict | None = None,
    design: str = "auto",
) -> LinearHeadOutput:
    """Loss of the output layer hidden @ weight.T under an objective, with exact d_hidden and dW.

    Args:
        hidden: [s, b, h] per rank, s divided by the group's size with sequence_parallel; or [T, h].
            bf16, fp16, fp32 or fp64. What Megatron hands to its output layer. Not changed.
        weight: [V, h], this rank's rows of the output layer, of hidden's dtype. Its gradient is
            returned through autograd in the same dtype.
        labels: [b, s] with [s, b, h], or [T]: int64 ids in the whole vocabulary, the same on all
            ranks of the group (not divided under sequence parallelism).
        mask: like labels, non-zero where supervised. None: labels other than −100 are.
        group: the tensor-parallel group; None: one rank holds the whole vocabulary.
        chunk_size: [tokens] at most chunk_size × V logits exist at a time.
        vocab_start: id of weight's first row; None: equal shards in rank order.
        vocab_size: number of real tokens; rows of weight from it on are padding, take no
            probability and get a zero gradient. None: every row is real.
        stats: further fields of `TokenStats` ([b, s] or [T] tensors like reference_log_prob and
            segment_ids; num_segments; process groups).
        design: "auto", "recompute" or "forward", see the top.

    Collectives over `group`: one all-gather of a few floats per supervised token, one all-reduce of
    d_hidden's supervised rows; with sequence parallelism an all-gather of the hidden states in
    each direction and one reduce-scatter instead.

    Raises ValueError where shapes do not fit or the design cannot serve the objective.
    """
    stats = dict(stats or {})
    ranks = world_size(group)
    sequence_parallel = sequence_parallel and ranks > 1
    _layout(hidden, labels, ranks if sequence_parallel else 1)
    if chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {chunk_size}; 256 is a good start"
        )
    if "kl" in objective.needs:
        raise ValueError(
            f"--loss-chunk-size: expected an objective that needs the target's probability, got "
            f"--loss {objective.name}, which needs the full distribution; leave it out"
        )
    supervised = (labels != -100) if mask is None else mask.to(torch.bool)

    def tokens(x: Tensor) -> Tensor:
        """Megatron's [b, s] in the order of the hidden states, [s·b]."""
        return x.reshape(-1) if x.dim() == 1 else x.t().reshape(-1)

    def like_labels(x: Tensor) -> Tensor:
        return x if labels.dim() == 1 else x.view(labels.shape[1], labels.shape[0]).t()

    if vocab_start is None:
        vocab_start = 0 if group is None else dist.get_rank(group) * len(weight)
    real = len(weight)
    if vocab_size is not None:
        real = min(max(vocab_size - vocab_start, 0), real)
    head = Head(
        rows=SupervisedRows(tokens(supervised), group, sequence_parallel),
        group=group,
        want=Wanted(
            sum_sq_prob="sum_sq_prob" in objective.needs,
            top_k=TOP_K if "entropy_top20" in objective.needs else 0,
        ),
        vocab_start=vocab_start,
        real=real,
        chunk_size=chunk_size,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    if _use_forward_design(design, hidden, weight, objective, ranks):
        per_token = {k: tokens(v) for k, v in stats.items() if isinstance(v, Tensor)}
        per_token.pop("segment_ids", None)
        outputs = LinearLoss.apply(flat, weight, tokens(labels), head, objective, per_token)
        return LinearHeadOutput(*(like_labels(x) for x in outputs))
    outputs = LinearStatistics.apply(flat, weight, tokens(labels), head)
    log_prob = like_labels(outputs[0])
    is_top1 = like_labels(outputs[1])
    entropy_top20, sum_sq_prob = (None if x is None else like_labels(x) for x in outputs[2:])
    loss, token_weight = objective(
        TokenStats(
            log_prob=log_prob,
            mask=supervised,
            entropy_top20=entropy_top20,
            sum_sq_prob=sum_sq_prob,
            **stats,
        )
    )
    return LinearHeadOutput(loss, token_weight, log_prob.detach(), is_top1)


def _use_forward_design(
    design: str, hidden: Tensor, weight: Tensor, objective: Objective, ranks: int
) -> bool:
    if design not in DESIGNS:
        raise ValueError(f"design: expected one of {', '.join(DESIGNS)}, got {design!r}")
    possible = ranks == 1 and objective.per_token
    if design == "forward" and not possible:
        raise ValueError(
            f"design: expected 'recompute' with {ranks} tensor-parallel ranks and --loss "
            f"{objective.name}, got 'forward', which needs one rank and weights of single tokens"
        )
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    wide = hidden.dtype in (torch.float32, torch.float64)
    return possible and differentiated and (design == "forward" or (design == "auto" and wide))
