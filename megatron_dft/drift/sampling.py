"""Answers that a base model itself gives to the task's prompts: what KL(base ‖ tuned) is about."""

from typing import Any

import numpy as np
import torch

from megatron_dft.drift.scoring import Batch

_BATCH = 16  # prompts a generation


def prompts_of(rows: Batch, count: int, seed: int = 0) -> list[np.ndarray]:
    """int64 ids up to each conversation's first scored token, of `count` of them at random."""
    found = [ids[: int(np.argmax(mask))] for ids, mask in rows if mask.any() and not mask[0]]
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in order]


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the generation settings' and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = set(given if isinstance(given, list) else [given]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def sample_answers(
    model: Any, prompts: list[np.ndarray], ends: list[int], max_tokens: int, seed: int = 0
) -> Batch:
    """One answer a prompt, drawn from the model's own distribution (temperature 1, uncut).

    `prompts`: int64 [n] ids each, not empty; `ends`: ids that close an answer. Returns (ids, mask)
    of prompt and answer, the mask True on the answer, its end included. The model's own generation
    settings are replaced: a penalty or a top-p would sample from another distribution.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = ends[0] if ends else 0
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    rows: Batch = []
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), _BATCH):
        part = ordered[start : start + _BATCH]
        longest = max(map(len, part))
        ids = torch.full((len(part), longest), pad, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, prompt in enumerate(part):  # padded on the left, where an answer does not go
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            seen[row, longest - len(prompt) :] = 1
        made = model.generate(input_ids=ids.to(device), attention_mask=seen.to(device))
        for prompt, answer in zip(part, made[:, longest:].cpu().numpy(), strict=True):
            closing = np.flatnonzero(np.isin(answer, ends))
            answer = answer[: closing[0] + 1] if len(closing) else answer
            whole = np.concatenate([prompt, answer])
            rows.append((whole, np.arange(len(whole)) >= len(prompt)))
    return rows
