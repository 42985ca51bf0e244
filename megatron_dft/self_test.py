"""The start-up self-test: does the objective's weight reach the gradient of this very model's loss?

A fused cross entropy that ignores its upstream gradient, or assumes it uniform over tokens, turns
DFT into SFT without a word. So before the first step the model's own loss function runs on random
logits in its own vocabulary layout, and the gradient is compared with the dense formula.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses.registry import Objective
from megatron_dft.losses.token_stats import TokenStats

TOKENS = 16


def _gather_vocabulary(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, V/tp] of every rank → [T, V]."""
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def reference_gradient(
    logits_TV: Tensor, labels_T: Tensor, upstream_T: Tensor, objective: Objective
) -> Tensor:
    """d(Σ upstream · loss)/d(logits) = upstream · w · (softmax − onehot), float64 [T, V]."""
    log_probs = logits_TV.double().log_softmax(-1)
    log_prob = log_probs.gather(-1, labels_T[:, None]).squeeze(-1)
    _, weight = objective(TokenStats(log_prob, torch.ones_like(log_prob)))
    onehot = torch.nn.functional.one_hot(labels_T, logits_TV.shape[-1])
    return (upstream_T.double() * weight)[:, None] * (log_probs.exp() - onehot)


def check_gradient(model: Any, objective: Objective, vocab_size: int, dtype: torch.dtype) -> float:
    """Run the self-test on the last pipeline stage's model.

    Args:
        model: GPTModel with an output layer, unwrapped.
        vocab_size: real vocabulary; labels are drawn below it.
        dtype: of the logits in training; decides the tolerance.

    Returns: the largest error relative to the largest gradient entry.

    Raises:
        RuntimeError: the gradient is not the objective's.
    """
    group = model.pg_collection.tp
    local = model.output_layer.output_size_per_partition
    device = next(model.parameters()).device
    # Same on every rank of the group: drawn on the CPU from a generator of its own.
    generator = torch.Generator().manual_seed(2508_05629)
    labels = torch.randint(vocab_size, (1, TOKENS), generator=generator).to(device)
    upstream = (torch.rand(1, TOKENS, generator=generator) + 0.5).to(device)
    boost = torch.linspace(0, 12, TOKENS)[:, None].to(device)
    shard_generator = torch.Generator().manual_seed(group.rank() + 1)
    shard = torch.randn(TOKENS, local, generator=shard_generator).to(device)
    # From hopeless to nearly certain targets, so that p covers (0, 1).
    mine = torch.arange(local, device=device)[None] + group.rank() * local == labels.T
    shard = torch.where(mine, shard + boost, shard).to(dtype)

    logits = shard.clone().unsqueeze(1).requires_grad_()
    # The cross entropy may overwrite its input; a leaf may not be overwritten.
    cross_entropy = model.compute_language_model_loss(labels, logits * 1.0).float()
    loss, _ = objective(TokenStats(-cross_entropy, torch.ones_like(cross_entropy)))
    (loss * upstream).sum().backward()
    assert logits.grad is not None
    whole = _gather_vocabulary(shard.float(), group)
    expected = reference_gradient(whole, labels[0], upstream[0], objective)
    expected = expected[:, group.rank() * local : (group.rank() + 1) * local]
    worst = (logits.grad[:, 0].double() - expected).abs().max()
    scale = expected.abs().max()
    both = torch.stack([worst, scale])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    error = (both[0] / both[1].clamp(min=1e-30)).item()
    # bf16 keeps 8 bits; Megatron's fused cross entropy returns a bf16 gradient even of fp32 logits.
    limit = 2e-2 if dtype != torch.float32 or model.config.cross_entropy_loss_fusion else 1e-5
    if not error <= limit:
        raise RuntimeError(
            f"--loss {objective.name}: self-test failed, the weight does not reach the gradient "
            f"(relative error {error:.2g}, limit {limit:g}); a fused cross entropy may ignore its "
            "upstream gradient: drop --cross-entropy-loss-fusion or update transformer-engine"
        )
    return error
