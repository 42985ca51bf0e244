"""Plain transformers models on text: what a base model thinks of each token it is to be taught."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# (ids, mask): int64 [n] token ids of one text; bool [n], True where the token is a scored target.
Sequences = Iterable[tuple[np.ndarray, np.ndarray]]
Batch = list[tuple[np.ndarray, np.ndarray]]

CHUNK = 128  # positions whose [positions, vocabulary] statistics are held at once
_BATCH = 1024  # tokens a forward pass; their logits are held at once


@dataclass
class TokenScores:
    """The scored tokens of some texts, K of them; all arrays [K]; entropies in nats.

    target: token ids; place: index inside its answer (a run of scored tokens), from 0; prob: the
    model's probability of the target; entropy: of its whole distribution; sum_sq: Σ_k p_k²;
    top, top_prob: the model's own first choice and its probability.
    """

    target: np.ndarray
    place: np.ndarray
    prob: np.ndarray
    entropy: np.ndarray
    sum_sq: np.ndarray
    top: np.ndarray
    top_prob: np.ndarray


def load_model(path: str | Path, device: str = "cpu") -> Any:
    """A transformers causal LM for scoring: safetensors only, no remote code, float32 on CPU.

    Raises ValueError (one line) where `path` holds no such model.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        model = _built(str(path), dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{path} cannot be loaded as a causal language model: {reason}; give a Hugging Face "
            "directory with config.json and *.safetensors"
        ) from None
    return model.to(device).eval()


def _built(path: str, **how: Any) -> Any:
    """The model with attention of torch's or transformers' own.

    Left to itself, transformers takes what config.json names: kernels of a hub, fetched and run.
    The argument alone is not enough, an `_attn_implementation` of the file goes before it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)

    def load(attention: str) -> Any:
        config._attn_implementation = attention
        return AutoModelForCausalLM.from_pretrained(
            path, config=config, attn_implementation=attention, **how
        )

    try:
        return load("sdpa")
    except ValueError as error:
        # Said before a weight is read: soft-capped scores (Gemma 2) are no part of torch's.
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")


def windows(sequences: Sequences, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Texts cut into windows of at most `length` tokens; windows without a target are left out.

    Windows do not overlap but for one token: the last of a window opens the next, as context.
    """
    for ids, mask in sequences:
        for start in range(0, max(len(ids) - 1, 1), length - 1):
            part, scored = ids[start : start + length], mask[start : start + length].copy()
            scored[:1] = False  # nothing predicts a window's first token
            if scored.any():
                yield part, scored


def answer_places(mask: np.ndarray) -> np.ndarray:
    """int64 [n]: each token's index in its run of True, 0 where mask is False."""
    counts = np.cumsum(mask)
    before = np.maximum.accumulate(np.where(mask, 0, counts))
    return np.where(mask, counts - before - 1, 0)


def batches(sequences: Sequences, tokens: int = _BATCH) -> Iterator[Batch]:
    """Texts of like length together, each batch of at most `tokens` padded tokens (or one text)."""
    ordered = sorted(sequences, key=lambda text: -len(text[0]))
    start = 0
    while start < len(ordered):
        count = max(tokens // len(ordered[start][0]), 1)
        yield ordered[start : start + count]
        start += count


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Float32 logits [K, V] of the positions that predict the K masked tokens of a batch's texts.

    A text's first token must not be masked (see `windows`). Padding is on the right, where a causal
    model's earlier positions cannot see it.
    """
    device = next(model.parameters()).device
    limit = model.get_input_embeddings().weight.shape[0]
    highest = max(int(ids.max()) for ids, _ in batch)
    if highest >= limit:
        raise ValueError(
            f"the text holds token id {highest}, but the model embeds {limit}; use the tokenizer "
            "that the model was trained with"
        )
    longest = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    predicting = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(batch):
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        predicting[row, : len(ids) - 1] = torch.from_numpy(mask[1:])
    logits = model(input_ids=tokens.to(device), use_cache=False).logits
    return logits[predicting.to(device)].float()


def targets_of(batch: Batch) -> np.ndarray:
    """int64 [K]: the masked tokens of a batch, in the order of `logits_of`."""
    return np.concatenate([ids[mask] for ids, mask in batch]).astype(np.int64)


@torch.no_grad()
def score(model: Any, sequences: Sequences) -> Iterator[TokenScores]:
    """`TokenScores` of batches of texts, in no particular order."""
    for batch in batches(sequences):
        logits_KV = logits_of(model, batch)
        target_K = targets_of(batch)
        places = np.concatenate([answer_places(mask)[mask] for _, mask in batch])
        target = torch.from_numpy(target_K).to(logits_KV.device)
        parts = [
            _statistics(logits_KV[s : s + CHUNK], target[s : s + CHUNK])
            for s in range(0, len(target), CHUNK)
        ]
        columns = [torch.cat(c).cpu().numpy() for c in zip(*parts, strict=True)]
        yield TokenScores(target_K, places, *columns)


def _statistics(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """prob, entropy, Σp², top id and its probability of float32 logits [K, V], targets [K]."""
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    # 0 · -inf would be NaN; p = 0 contributes nothing to an entropy.
    entropy = -(p * log_p.clamp_min(-1e4)).sum(-1)
    top_prob, top = p.max(-1)
    chosen = p.gather(1, target[:, None]).squeeze(1)
    return chosen, entropy, (p * p).sum(-1), top, top_prob
