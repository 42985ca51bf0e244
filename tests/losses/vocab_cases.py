"""Logits over vocabulary shards, and what each rank computes of them."""

import torch
import torch.distributed as dist

from megatron_dft.losses import registry
from megatron_dft.losses.vocab_parallel import (
    vocab_parallel_loss,
    vocab_parallel_statistics,
    vocab_shard_start,
)
from tests.losses import collectives
from tests.losses.reference import PARAMETERS, data_stats, dense_loss, entropy_of_top

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


TOKENS, VOCAB = 23, 64


def make_case(seed: int, dtype: torch.dtype, supervised: float = 0.6, vocab: int = VOCAB) -> dict:
    """Logits of a model that is sure of some tokens and knows nothing of others.

    No surer than p ≈ 0.999: of 1 − p, fp32 keeps 6e-8 / (1 − p).
    """
    g = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(TOKENS, vocab, generator=g)
    target = torch.randint(vocab, (TOKENS,), generator=g)
    logits[torch.arange(TOKENS), target] += 4 * torch.rand(TOKENS, generator=g)
    mask = torch.rand(TOKENS, generator=g) < supervised
    reference = logits + 0.5 * torch.randn(TOKENS, vocab, generator=g)
    return {
        "logits": logits.to(dtype),
        "reference": reference.to(dtype),
        "target": torch.where(mask, target, -100),
        "segments": torch.arange(TOKENS) // 6,
        "upstream": torch.randn(TOKENS, generator=g),
    }


def exact(name: str, case: dict) -> tuple:
    """(loss, gradient) in float64."""
    logits = case["logits"].double().clone().requires_grad_()
    mask = case["target"] != -100
    loss, _ = dense_loss(
        name, logits, case["target"], mask, case["segments"], case["reference"].double()
    )
    loss.backward(case["upstream"].double())
    return loss.detach(), logits.grad


def ours(name: str, case: dict, group, **options) -> tuple:
    """(loss, weight, this shard's gradient)."""
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    vocab = case["logits"].shape[1]
    shard = slice(vocab * rank // size, vocab * (rank + 1) // size)
    logits = case["logits"][:, shard].clone().requires_grad_()
    log_ref = case["reference"].double().log_softmax(-1)
    log_ref = log_ref.gather(1, case["target"].clamp(min=0).unsqueeze(1)).squeeze(1)
    objective = registry.get(name.split("/")[0], **PARAMETERS[name])
    if "kl" in objective.needs:
        options["reference_logits"] = case["reference"][:, shard]
    # An in-place gradient may not be written into a leaf.
    loss, weight = vocab_parallel_loss(
        logits * 1.0,
        case["target"],
        group,
        objective,
        token_stats=data_stats(case["segments"], log_ref.float()),
        **options,
    )
    loss.backward(case["upstream"])
    return loss.detach(), weight, logits.grad


def all_objectives(runs: list) -> list:
    options = {"chunk_bytes": 4 * VOCAB * 5 // dist.get_world_size()}
    return [
        ours(
            name,
            make_case(seed, dtype),
            dist.group.WORLD,
            overwrite_logits=seed % 2 == 1,
            **options,
        )
        for name, seed, dtype in runs
    ]


def _statistics(case, borders, upstream, names):
    rank = dist.get_rank()
    shard = slice(borders[rank], borders[rank + 1])
    logits = case["logits"][:, shard].clone().requires_grad_()
    start = vocab_shard_start(logits.shape[1], dist.group.WORLD)
    assert start == borders[rank]
    calls = collectives.count("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")
    stats = vocab_parallel_statistics(
        logits,
        case["target"],
        dist.group.WORLD,
        entropy=True,
        entropy_top20=True,
        sum_sq_prob=True,
        reference_logits=case["reference"][:, shard],
        vocab_start=start,
    )
    forward = dict(calls)
    gradients = []
    for name in names:
        (gradient,) = torch.autograd.grad(getattr(stats, name), logits, upstream, retain_graph=True)
        gradients.append(gradient)
    (both,) = torch.autograd.grad([getattr(stats, n) for n in names], logits, [upstream] * 5)
    return (
        [getattr(stats, n).detach() for n in names],
        gradients,
        both,
        forward,
        dict(calls),
        stats.is_top1,
    )


def exact_statistics(case) -> tuple:
    logits = case["logits"].double().requires_grad_()
    log_probs = logits.log_softmax(-1)
    reference = case["reference"].double().log_softmax(-1)
    probs = log_probs.exp()
    target = case["target"].clamp(min=0).unsqueeze(1)
    finite = torch.where(probs > 0, log_probs, 0.0)
    kl_terms = torch.where(reference > -torch.inf, reference.exp() * (reference - finite), 0.0)
    values = {
        "log_prob": log_probs.gather(1, target).squeeze(1),
        "entropy": -(probs * finite).sum(-1),
        "entropy_top20": entropy_of_top(torch.where(probs > 0, log_probs, -1e4)),
        "sum_sq_prob": probs.square().sum(-1),
        "kl": kl_terms.sum(-1),
    }
    return logits, values


def shared_by_equals(gradient, logits):
    """Mean over equal logits of a row: which of them is the 20th likeliest token is arbitrary."""
    same = (logits.detach().unsqueeze(2) == logits.detach().unsqueeze(1)).double()
    return (same @ gradient.double().unsqueeze(2)).squeeze(2) / same.sum(2)
