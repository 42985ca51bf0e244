"""DFT in a loop of your own, from logits whose vocabulary is cut over tensor-parallel ranks.

    python examples/loops/from_logits.py
    torchrun --nproc-per-node 2 examples/loops/from_logits.py      the same figures

Labels come already shifted: labels[:, t] is the token that logits[:, t] predicts, so the model sees
ids[:, :-1] and the labels are ids[:, 1:]. Nothing here can notice labels that were not shifted.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dft.losses.vocab_parallel import vocab_parallel_dft_loss, vocab_parallel_loss

VOCAB, HIDDEN, PAD, EQUALS = 16, 64, 15, 10  # ids 0-9 are digits
IGNORED = -100


def batches(seed: int, rows: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [b, s], supervised [b, s]): two digits, =, their sum's digits, which train."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        left, right = torch.randint(10, (2, rows), generator=generator)
        tens, ones = (left + right) // 10, (left + right) % 10
        ids = torch.stack([left, right, torch.full_like(left, EQUALS), tens, ones], 1)
        short = tens == 0
        ids[short, 3], ids[short, 4] = ones[short], PAD
        supervised = ids != PAD
        supervised[:, :3] = False
        yield ids, supervised


def shifted(ids: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """(what the model reads, labels), both [b, s − 1]; -100 where a token does not train."""
    return ids[:, :-1], torch.where(supervised, ids, IGNORED)[:, 1:]


class _SumOfGradients(torch.autograd.Function):
    """The hidden states as they are; their gradient is the sum of what the shards ask for."""

    @staticmethod
    def forward(ctx, hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.group is not None:
            dist.all_reduce(grad := grad.contiguous(), group=ctx.group)
        return grad, None


class Model(nn.Module):
    """A small recurrent model; every rank holds all of it but the rows of the output layer."""

    def __init__(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.embedding = nn.Embedding(VOCAB, HIDDEN, dtype=dtype)
        self.body = nn.GRU(HIDDEN, HIDDEN, batch_first=True, dtype=dtype)
        whole = torch.randn(VOCAB, HIDDEN, dtype=dtype) / HIDDEN**0.5
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.output = nn.Parameter(whole.chunk(size)[rank].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [b, s, V/tp] of this rank's part of the vocabulary."""
        hidden, _ = self.body(self.embedding(ids))
        return _SumOfGradients.apply(hidden, self.group) @ self.output.t()


def step(
    model: Model, micro_batches: list[tuple[Tensor, Tensor]], objective: str = "dft"
) -> dict[str, float]:
    """Gradients of one optimizer step, summed over micro-batches of unlike numbers of tokens."""
    pairs = [shifted(*batch) for batch in micro_batches]
    # One normaliser for the whole step: the supervised tokens of all its micro-batches (and of all
    # data-parallel ranks, where there are any), never the sum of the weights.
    tokens = sum(int((labels != IGNORED).sum()) for _, labels in pairs)
    total = {"loss": 0.0, "weight": 0.0}
    for ids, labels in pairs:
        if objective == "dft":
            loss, weight = vocab_parallel_dft_loss(model(ids), labels, model.group)
        else:  # any other of the registry, by its name
            loss, weight = vocab_parallel_loss(model(ids), labels, model.group, objective)
        (loss.sum() / tokens).backward()
        total["loss"] += loss.detach().sum().item() / tokens
        total["weight"] += weight.sum().item() / tokens
    return total


def train(
    steps: int, base_steps: int, group: dist.ProcessGroup | None = None
) -> list[dict[str, float]]:
    """The figures of every step. DFT sharpens what a model knows, and this one begins with
    nothing: so many steps of cross entropy stand in for its pre-training."""
    model = Model(group, torch.float32)
    # No clipping here: a norm over cut parameters has to be summed over the ranks.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, history = batches(seed=1), []
    for i in range(base_steps + steps):
        optimizer.zero_grad()
        objective = "sft" if i < base_steps else "dft"
        history.append(step(model, [next(data), next(data)], objective))
        optimizer.step()
    return history


def main() -> None:
    group = None
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    history = train(100, 50, group)
    if group is None or dist.get_rank() == 0:
        for i in (0, 49, 50, 99, 149):
            name, figures = "sft" if i < 50 else "dft", history[i]
            print(f"step {i:3d} {name}: loss {figures['loss']:.4f}, weight {figures['weight']:.3f}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
