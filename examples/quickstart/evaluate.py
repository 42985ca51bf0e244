"""Score a Hugging Face checkpoint on held-out problems: exact match, cross entropy, mean p.

    python examples/quickstart/evaluate.py --model DIR --data held_out.jsonl --out scores.json

Greedy decoding on CPU in fp32; prompt and decoding are the same for every model that is scored. All
replies are kept in the file.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from arithmetic import extract_answer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_dft.drift.scoring import load_model

# What the workers inherit by fork: model, tokenizer, batch size, longest reply.
_inherited: tuple = ()


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a `messages` JSONL file; the last message of each is the solution."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def left_pad(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [rows, longest] int64, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.inference_mode()
def replies(model, tokenizer, prompts: list[list[int]], batch_size: int, most: int) -> list[str]:
    """The greedy reply to each prompt of token ids, at most `most` tokens, ended by EOS."""
    texts: list[str] = []
    for batch in batches(prompts, batch_size):
        ids, mask = left_pad(batch, tokenizer.pad_token_id)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


@torch.inference_mode()
def solution_nll(model, tokenizer, prompts, solutions, batch_size: int) -> torch.Tensor:
    """−log p of every solution token, EOS included: [all solution tokens] fp32, natural log."""
    nll = []
    pairs = list(zip(prompts, solutions, strict=True))
    for batch in batches(pairs, batch_size):
        ids, mask = left_pad([p + s for p, s in batch], tokenizer.pad_token_id)
        longest = max(len(s) for _, s in batch)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
        targets = ids[:, -longest:]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        nll += [row[longest - len(s) :] for row, (_, s) in zip(losses, batch, strict=True)]
    return torch.cat(nll)


def _score_part(rows: list[list[dict[str, str]]]) -> tuple[list[str], torch.Tensor]:
    """Replies and −log p for a part of the problems, in a forked worker."""
    torch.set_num_threads(1)
    model, tokenizer, batch_size, most = _inherited
    prompts = [
        tokenizer.apply_chat_template(
            row[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    solutions = [
        tokenizer.encode(row[-1]["content"], add_special_tokens=False) + [tokenizer.eos_token_id]
        for row in rows
    ]
    nll = solution_nll(model, tokenizer, prompts, solutions, batch_size)
    return replies(model, tokenizer, prompts, batch_size, most), nll


def evaluate(model_dir: str, data: Path, batch_size: int, most: int, workers: int) -> dict:
    """Scores of one checkpoint; `samples` holds the first questions with the replies."""
    global _inherited
    start = time.monotonic()
    # Processes of one thread share out the problems: a decoding step is too small for two threads.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = load_model(model_dir)
    _inherited = (model, tokenizer, batch_size, most)
    rows = read_messages(data)
    # Unlike multiprocessing's own pool, this one fails where a worker is killed for memory.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        parts = list(pool.map(_score_part, [rows[i::workers] for i in range(workers)]))
    texts: list[str] = [""] * len(rows)
    for i, (part, _) in enumerate(parts):
        texts[i::workers] = part
    nll = torch.cat([part for _, part in parts])
    wanted = [extract_answer(row[-1]["content"]) for row in rows]
    right = sum(extract_answer(text) == answer for text, answer in zip(texts, wanted, strict=True))
    return {
        "model": str(model_dir),
        "problems": len(rows),
        "correct": right,
        "accuracy": right / len(rows),
        "cross_entropy": nll.mean().item(),
        "mean_target_probability": nll.neg().exp().mean().item(),
        "solution_tokens": nll.numel(),
        "seconds": time.monotonic() - start,
        "samples": [
            {"question": row[-2]["content"], "solution": row[-1]["content"], "reply": text}
            for row, text in zip(rows, texts, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the HF checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="held-out `messages` JSONL")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the scores")
    parser.add_argument("--batch-size", type=int, default=38, help="problems in one batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest reply, in tokens")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    workers = min(os.cpu_count() or 1, 8)
    try:
        scores = evaluate(args.model, args.data, args.batch_size, args.max_new_tokens, workers)
    except BrokenProcessPool:
        sys.exit(
            f"error: one of {workers} scoring processes was killed, most likely for memory "
            f"(each takes about 1.5 GiB); lower --batch-size {args.batch_size}"
        )
    partial = args.out.with_suffix(".part")
    partial.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    partial.replace(args.out)
    print(
        f"{scores['correct']} of {scores['problems']} right ({scores['accuracy']:.1%}), "
        f"cross entropy {scores['cross_entropy']:.3f}, mean target probability "
        f"{scores['mean_target_probability']:.3f}, {scores['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
