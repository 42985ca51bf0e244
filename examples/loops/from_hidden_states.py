"""DFT in a loop of your own, from hidden states: the output layer and the loss in one operator.

    python examples/loops/from_hidden_states.py                    a tiny random model
    python examples/loops/from_hidden_states.py DIRECTORY          any causal model of transformers
    torchrun --nproc-per-node 2 examples/loops/from_hidden_states.py       two data-parallel ranks

The [tokens, vocabulary] logits never exist as a whole. Labels come already shifted: labels[:, t] is
the token that hidden[:, t] predicts, so the model sees ids[:, :-1] and the labels are ids[:, 1:].
"""

import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_dft.losses.linear_head import linear_head_loss

IGNORED = -100


def load(directory: str | None) -> torch.nn.Module:
    """The model to train, in fp32."""
    if directory is not None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))


def batches(seed: int, rows: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [b, s], labels [b, s − 1]): counting on from a random number in steps of 1 to 4.

    The first three tokens are the prompt; of the rest each row trains another number. Your
    tokenizer's ids and your mask of answer tokens go in the place of this function.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(16)
    while True:
        start = torch.randint(12, (rows, 1), generator=generator)
        stride = torch.randint(1, 5, (rows, 1), generator=generator)
        length = torch.randint(5, 17, (rows, 1), generator=generator)
        ids = (start + stride * place) % 12
        supervised = (place >= 3) & (place < length)
        yield ids, torch.where(supervised, ids, IGNORED)[:, 1:]


def step(
    model: torch.nn.Module,
    micro_batches: list[tuple[Tensor, Tensor]],
    objective: str = "dft",
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Gradients of one optimizer step over micro-batches, and over data-parallel ranks."""
    # The normaliser is the step's number of supervised tokens, on all ranks and in all its
    # micro-batches: a mean of each micro-batch's mean would favour the tokens of short answers.
    tokens = torch.tensor(sum(int((labels != IGNORED).sum()) for _, labels in micro_batches))
    if group is not None:
        dist.all_reduce(tokens, group=group)
    total = torch.zeros(3)
    for ids, labels in micro_batches:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # [b, s, h]
        out = linear_head_loss(
            hidden, model.lm_head.weight, labels, objective=objective, batch_first=True
        )
        (out.loss.sum() / tokens).backward()
        total += torch.stack([out.loss.sum(), -out.log_prob.sum(), out.is_top1.sum()]).detach()
    if group is not None:
        dist.all_reduce(total, group=group)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)  # a sum: the normaliser is everybody's
    return dict(zip(("loss", "cross entropy", "accuracy"), (total / tokens).tolist(), strict=True))


def train(
    steps: int,
    base_steps: int = 0,
    directory: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, float]]:
    """The figures of every step; each data-parallel rank takes micro-batches of its own.

    DFT sharpens what a model knows: for a random one, `base_steps` of cross entropy come first.
    """
    model = load(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    data, history = batches(seed=1), []
    for i in range(base_steps + steps):
        optimizer.zero_grad()
        mine = [next(data) for _ in range(4)][rank::size]
        history.append(step(model, mine, "sft" if i < base_steps else "dft", group))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return history


def main() -> None:
    group = None
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    directory = sys.argv[1] if len(sys.argv) > 1 else None
    base_steps = 20 if directory is None else 0
    history = train(30, base_steps, directory, group)
    if group is None or dist.get_rank() == 0:
        for i in sorted({0, max(base_steps - 1, 0), base_steps, len(history) - 1}):
            name = "sft" if i < base_steps else "dft"
            figures = ", ".join(f"{k} {v:.4f}" for k, v in history[i].items())
            print(f"step {i:3d} {name}: {figures}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
