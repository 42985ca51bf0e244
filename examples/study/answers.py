"""What a model answers: exact match, and the cross entropy of the right answers."""

from pathlib import Path
from typing import Any

import corpus
import torch
from torch.nn.functional import log_softmax

from megatron_dft.drift.scoring import load_model


def load(directory: Path) -> Any:
    """The checkpoint in transformers, float32, on the CPU."""
    return load_model(directory)


@torch.no_grad()
def score(model: Any, rows: list[corpus.Row]) -> dict[str, float]:
    """Over rows of one kind, whose prompts have one length and whose completions have one too.

    greedy: share of problems whose greedy answer, EOS included, is the right one: that is where the
    right token is the first choice at every place, given the right tokens before it. sampled: the
    probability that an answer drawn at temperature 1 is right, exactly, so without drawing: the
    mean of exp(Σ log p) (the paper's Avg@16 estimates it from 16 draws). cross_entropy: nats a
    token of the right answer.
    """
    ids = {word: i for i, word in enumerate(corpus.vocabulary())}
    prompts = [[corpus.BOS, *row["prompt"].split()] for row in rows]
    answers = [[*row["completion"].split(), corpus.EOS] for row in rows]
    tokens = torch.tensor([[ids[w] for w in p + a] for p, a in zip(prompts, answers, strict=True)])
    begin = len(prompts[0])
    target_NT = tokens[:, begin:]
    logits_NTV = model(input_ids=tokens, use_cache=False).logits[:, begin - 1 : -1].float()
    log_p_NT = log_softmax(logits_NTV, dim=-1).gather(-1, target_NT[..., None]).squeeze(-1).double()
    return {
        "greedy": float((logits_NTV.argmax(-1) == target_NT).all(-1).double().mean()),
        "sampled": float(log_p_NT.sum(-1).exp().mean()),
        "cross_entropy": float(-log_p_NT.mean()),
    }
