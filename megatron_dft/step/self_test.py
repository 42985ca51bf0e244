"""The start-up self-test: does the objective's weight reach the gradient of this very model's loss?

A fused cross entropy that ignores its upstream gradient, or assumes it uniform over tokens, turns
DFT into SFT without a word. So before the first step the model's own loss function runs on random
logits (or the chunked head on random hidden states) in its own vocabulary layout, and the gradient
is compared with the dense formula.

Shapes: T tokens, V the local vocabulary, h hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.registry import Objective
from megatron_dft.losses.token_stats import TokenStats

TOKENS = 16
_GENERATOR_SEED = 250805629


def _tested(objective: Objective) -> Objective:
    """The objective itself where it looks at single tokens; DFT's weight for the others."""
    return objective if objective.per_token and not objective.needs else registry.get("dft")


def _whole_vocabulary(shard_TV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, V] of every rank side by side."""
    parts = [torch.empty_like(shard_TV) for _ in range(group.size())]
    dist.all_gather(parts, shard_TV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def reference_gradient(
    logits: Tensor, labels: Tensor, upstream: Tensor, objective: Objective
) -> Tensor:
    """d(Σ upstream · loss)/d(logits) = upstream · w · (softmax − onehot), float64.

    logits [T, whole vocabulary], labels int64 [T], upstream [T].
    """
    log_probs = logits.double().log_softmax(-1)
    log_prob = log_probs.gather(-1, labels[:, None]).squeeze(-1)
    _, weight = objective(TokenStats(log_prob, torch.ones_like(log_prob)))
    onehot = torch.nn.functional.one_hot(labels, logits.shape[-1])
    return (upstream.double() * weight)[:, None] * (log_probs.exp() - onehot)


def _draw(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels int64 [T] and upstream gradients fp32 [T], the same on every rank of the group."""
    generator = torch.Generator().manual_seed(_GENERATOR_SEED)
    labels = torch.randint(vocab_size, (TOKENS,), generator=generator)
    upstream = torch.rand(TOKENS, generator=generator) + 0.5
    return labels.to(device), upstream.to(device)


def _judge(
    got: Tensor, expected: Tensor, group: dist.ProcessGroup, limit: float, name: str
) -> float:
    pair = torch.stack([(got.double() - expected).abs().max(), expected.abs().max()])
    dist.all_reduce(pair, op=dist.ReduceOp.MAX, group=group)
    error = (pair[0] / pair[1].clamp(min=1e-30)).item()
    if not error <= limit:
        raise RuntimeError(
            f"--loss {name}: self-test failed, the weight does not reach the gradient (relative "
            f"error {error:.2g}, limit {limit:g}); a fused cross entropy may ignore its upstream "
            "gradient: drop --cross-entropy-loss-fusion or update transformer-engine"
        )
    return error


def check_gradient(model: Any, objective: Objective, vocab_size: int, dtype: torch.dtype) -> float:
    """Self-test of the model's own cross entropy under the objective, on the last pipeline stage.

    Args:
        model: GPTModel with an output layer, unwrapped.
        vocab_size: real vocabulary; labels are drawn below it.
        dtype: of the logits in training; decides the tolerance.

    Returns: the largest error relative to the largest gradient entry.

    Raises:
        RuntimeError: the gradient is not the objective's.
    """
    group, objective = model.pg_collection.tp, _tested(objective)
    local = model.output_layer.output_size_per_partition
    labels, upstream = _draw(vocab_size, next(model.parameters()).device)
    generator = torch.Generator().manual_seed(group.rank() + 1)
    shard = torch.randn(TOKENS, local, generator=generator).to(labels.device)
    # From hopeless to nearly certain targets, so that p covers (0, 1).
    ids = torch.arange(local, device=labels.device) + group.rank() * local
    boost = torch.linspace(0, 12, TOKENS, device=labels.device)[:, None]
    shard = torch.where(ids[None] == labels[:, None], shard + boost, shard).to(dtype)

    logits = shard.unsqueeze(1).requires_grad_()
    # The cross entropy may overwrite its input, which a leaf does not allow.
    cross_entropy = model.compute_language_model_loss(labels[None], logits * 1.0).float()
    loss, _ = objective(TokenStats(-cross_entropy, torch.ones_like(cross_entropy)))
    (loss * upstream).sum().backward()
    assert logits.grad is not None
    whole = _whole_vocabulary(shard.detach().float(), group)
    expected = reference_gradient(whole, labels, upstream, objective)
    expected = expected[:, group.rank() * local : (group.rank() + 1) * local]
    # bf16 keeps 8 bits; Megatron's fused cross entropy gives a bf16 gradient even of fp32 logits.
    fp32 = dtype == torch.float32 and not model.config.cross_entropy_loss_fusion
    return _judge(logits.grad[:, 0], expected, group, 1e-5 if fp32 else 2e-2, objective.name)


def check_head_gradient(
    model: Any, objective: Objective, vocab_size: int, dtype: torch.dtype, chunk_size: int
) -> float:
    """Self-test of the chunked head on the model's own output weight: d_hidden by the formula.

    Arguments, result and error as in `check_gradient`.
    """
    group, objective = model.pg_collection.tp, _tested(objective)
    weight = model.output_layer.weight
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    weight = weight.detach().to(dtype)
    labels, upstream = _draw(vocab_size, weight.device)
    generator = torch.Generator().manual_seed(_GENERATOR_SEED)
    hidden = torch.randn(TOKENS, weight.shape[1], generator=generator).to(weight.device, dtype)
    hidden = (hidden * 3 / weight.float().std() / weight.shape[1] ** 0.5).to(dtype)
    dist.broadcast(hidden, dist.get_process_group_ranks(group)[0], group=group)
    real = min(max(vocab_size - group.rank() * len(weight), 0), len(weight))
    logits = hidden.float() @ weight.float().T
    logits[:, real:] = float("-inf")
    whole = _whole_vocabulary(logits, group)
    # Half of the targets are the model's first choice, so that p covers (0, 1).
    labels = torch.where(
        torch.arange(TOKENS, device=labels.device) % 2 == 0, labels, whole.argmax(-1)
    )

    hidden.requires_grad_()
    out = linear_head_loss(
        hidden, weight, labels, objective=objective, group=group, chunk_size=chunk_size,
        vocab_size=vocab_size,
    )  # fmt: skip
    (out.loss * upstream).sum().backward()
    assert hidden.grad is not None
    gradient = reference_gradient(whole, labels, upstream, objective)
    mine = gradient[:, group.rank() * len(weight) :][:, : len(weight)]
    expected = mine @ weight.double()
    dist.all_reduce(expected, group=group)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    return _judge(hidden.grad, expected, group, limit, objective.name)
