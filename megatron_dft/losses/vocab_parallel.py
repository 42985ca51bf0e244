"""Token statistics and the DFT loss from vocabulary-sharded logits, for any training loop.

Shapes: T tokens (any leading axes), V this rank's part of the vocabulary. Each rank of `group`
holds logits [..., V] and the same targets [...]; every result is equal on all ranks.

One collective (an all-gather of a few floats per token) in the forward, none in the backward.
Logits are read in chunks, so no fp32 copy of them is made or kept; only supervised tokens are
computed (finding them costs one device synchronisation).

>>> # target[t] is the token that logits[t] predicts: shifted already.
>>> logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
>>> target = torch.tensor([0, -100])            # -100: not supervised
>>> loss, weight = vocab_parallel_dft_loss(logits, target, group=None)
>>> weight                                      # p of the target token
tensor([0.7112, 0.0000])
>>> (loss.sum() / (target != -100).sum()).backward()
>>> logits.grad[0]                              # p · (softmax − onehot)
tensor([-0.2054,  0.0685,  0.0685,  0.0685])

With tensor parallelism, `group` is the tensor-parallel group and `logits` the output of a
column-parallel output layer with gather_output=False.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses import kernels, registry
from megatron_dft.losses.token_stats import TokenLoss, TokenStats
from megatron_dft.losses.vocab_autograd import Call, VocabParallelStatistics, world_size
from megatron_dft.losses.vocab_statistics import Wanted
from megatron_dft.losses.weighting import Objective

TOP_K = 20


class VocabStatistics(NamedTuple):
    """Per-token results, fp32 (fp64 for fp64 logits), of the targets' shape, differentiable with
    respect to the logits, 0 where the target is ignored; None where not asked for.

    `is_top1` (bool) tells whether greedy decoding takes the target, the first of equally likely
    tokens: its mean is the accuracy.
    """

    log_prob: Tensor
    is_top1: Tensor
    entropy: Tensor | None
    entropy_top20: Tensor | None
    sum_sq_prob: Tensor | None
    kl: Tensor | None

    @property
    def prob(self) -> Tensor:
        """Probability of the target token, detached."""
        return self.log_prob.detach().clamp(max=0.0).exp()


def _function(logits: Tensor) -> type[torch.autograd.Function]:
    """The kernels' autograd function where they serve, else the one in torch's own operations."""
    if not kernels.serve(logits):
        return VocabParallelStatistics
    from megatron_dft.losses.kernels.autograd import KernelStatistics  # imports Triton

    return KernelStatistics


def _token_order(logits: Tensor) -> list[int]:
    """Leading axes by falling stride: [s, b, V] seen as [b, s, V] then flattens without a copy."""
    strides = logits.stride()
    return sorted(range(logits.dim() - 1), key=lambda axis: -strides[axis])


def vocab_parallel_statistics(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    entropy: bool = False,
    entropy_top20: bool = False,
    sum_sq_prob: bool = False,
    reference_logits: Tensor | None = None,
    reference_share: float = 1.0,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    overwrite_logits: bool = False,
) -> VocabStatistics:
    """Statistics of the target tokens under a softmax whose vocabulary is sharded over `group`.

    Args:
        logits: [..., V] per rank, bf16, fp16, fp32 or fp64, any strides; not changed (but see
            overwrite_logits). −inf excludes a token. A copy is made only if the leading axes
            cannot be flattened in any order.
        target: [...] int64, ids in the whole vocabulary, the same on each rank, shifted already:
            target[t] is the token that logits[t] predicts. `ignore_index` marks tokens without a
            target: their logits are not even read. A target that no shard holds gives NaN.
        group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        reference_logits: [..., V] per rank, like `logits`: asks for KL(reference ‖ logits).
            Constant.
        reference_share: η in (0, 1]: the KL's reference is softmax((1 − η)·z + η·z_ref) of the
            logits z and z_ref, a constant.
        vocab_start: id of this shard's first column. None: equal shards in rank order, as Megatron
            cuts them. For uneven shards: `vocab_shard_start` once at set-up.
        vocab_size: number of real tokens; columns from it on are padding and take no probability
            and no gradient. None: every column is real.
        chunk_bytes: [bytes] of the fp32 temporary. None: 32 MiB on a CPU, 256 MiB on a GPU.
        overwrite_logits: the gradient takes the storage of `logits`, whose values are lost, in the
            forward already where they are fp32: half the peak memory and the least time, when
            nothing but this loss needs the logits. One backward only.

    Raises ValueError where shapes do not fit.
    """
    if logits.shape[:-1] != target.shape:
        turned = target.dim() == 2 and logits.shape[:-1] == target.shape[::-1]
        raise ValueError(
            f"target: expected the shape {tuple(logits.shape[:-1])} of logits without its last "
            f"axis, got {tuple(target.shape)}; "
            + ("transpose it: target.t()" if turned else "logits[:, :-1] go with ids[:, 1:]")
        )
    if reference_logits is not None and reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits: expected the shape {tuple(logits.shape)} of logits, got "
            f"{tuple(reference_logits.shape)}; give both in the same vocabulary shards"
        )
    vocab = logits.shape[-1]
    if vocab_start is None:
        vocab_start = 0 if group is None else dist.get_rank(group) * vocab
    if vocab_size is not None:
        real = min(max(vocab_size - vocab_start, 0), vocab)
        logits = logits[..., :real]
        reference_logits = None if reference_logits is None else reference_logits[..., :real]
    wants_kl, top_k = reference_logits is not None, TOP_K if entropy_top20 else 0
    want = Wanted(entropy, sum_sq_prob, top_k, wants_kl, reference_share)
    call = Call(want, group, vocab_start, ignore_index, chunk_bytes, overwrite_logits)
    order = _token_order(logits)
    ordered_target = target.permute(order)

    def flat(x: Tensor) -> Tensor:
        return x.permute(*order, -1).flatten(0, -2) if order else x.unsqueeze(0)

    reference = None if reference_logits is None else flat(reference_logits.detach())
    outputs = _function(logits).apply(flat(logits), ordered_target.reshape(-1), reference, call)
    inverse = [order.index(axis) for axis in range(len(order))]

    def shaped(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.view(ordered_target.shape).permute(inverse)

    return VocabStatistics(*(shaped(x) for x in outputs))  # type: ignore[arg-type]


def vocab_shard_start(local_size: int, group: dist.ProcessGroup | None, device: Any = None) -> int:
    """First vocabulary id of this rank's shard when shards differ in size; one small collective."""
    if world_size(group) == 1:
        return 0
    sizes = torch.zeros(world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([local_size], device=device), group=group)
    return int(sizes[: dist.get_rank(group)].sum())


def vocab_parallel_loss(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None,
    objective: Objective | str,
    *,
    token_stats: dict[str, Any] | None = None,
    **options: Any,
) -> TokenLoss:
    """Per-token loss and weight [...] of any objective of the registry, or of its name: "dft".

    `token_stats` are further fields of `TokenStats` (segment_ids, reference_log_prob, …),
    `options` those of `vocab_parallel_statistics`. What the objective needs of the vocabulary is
    computed with it, in the same collective.
    """
    objective = registry.named(objective)
    for name, values in (token_stats or {}).items():
        if isinstance(values, Tensor) and values.shape != target.shape:
            raise ValueError(
                f"{name}: expected the shape {tuple(target.shape)} of target, got "
                f"{tuple(values.shape)}"
            )
    stats = vocab_parallel_statistics(
        logits,
        target,
        group,
        entropy="entropy" in objective.needs,
        entropy_top20="entropy_top20" in objective.needs,
        sum_sq_prob="sum_sq_prob" in objective.needs,
        reference_share=objective.reference_share,
        **options,
    )
    fields = {k: v for k, v in stats._asdict().items() if v is not None and k != "is_top1"}
    mask = target != options.get("ignore_index", -100)
    return objective(TokenStats(mask=mask, **fields, **(token_stats or {})))


def vocab_parallel_dft_loss(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup | None = None, **options: Any
) -> TokenLoss:
    """DFT (arXiv 2508.05629): per-token loss −sg(p)·log p and weight p, fp32, of target's shape.

    The probability p of the target token is gathered across the vocabulary shards. Gradient of a
    token's loss with respect to its logits: p·(softmax − onehot). Divide the summed loss by the
    number of supervised tokens. Arguments as in `vocab_parallel_statistics`; example at the top.
    """
    return vocab_parallel_loss(logits, target, group, registry.get("dft"), **options)
