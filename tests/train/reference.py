"""The same fine-tuning in plain torch and transformers: what Megatron's loop has to agree with.

Written from the formulas: DFT's loss is −sg(p)·log p summed over the supervised tokens of the
global batch and divided by their number; AdamW with Megatron's hyper-parameters; no weight decay on
norms.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_rows(model: Path, data: Path) -> list[tuple[list[int], list[int]]]:
    """(token ids, 1 where the token belongs to an assistant turn) of each conversation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for line in data.read_text().splitlines():
        ids: list[int] = []
        trained: list[int] = []
        for message in json.loads(line)["messages"]:
            head = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
            body = tokenizer.encode(f"{message['content']}<|im_end|>", add_special_tokens=False)
            tail = tokenizer.encode("\n", add_special_tokens=False)
            mine = int(message["role"] == "assistant")
            ids += head + body + tail
            trained += [0] * len(head) + [mine] * len(body) + [0] * len(tail)
        rows.append((ids, trained))
    return rows


def dft_loss(logits, labels, mask):
    """Σ −sg(p)·log p over the supervised tokens of one conversation, [s, V], [s], [s] → scalar."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (-(log_p.detach().exp()) * log_p * mask).sum()


def asft_loss(logits, labels, mask, base_logits, kl_weight):
    """DFT + λ·KL(π_base ‖ π_θ) over the whole vocabulary, summed over the supervised tokens."""
    base, own = base_logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (base.exp() * (base - own)).sum(-1)
    return dft_loss(logits, labels, mask) + kl_weight * (kl * mask).sum()


def iw_sft_loss(logits, labels, mask, base_logits):
    """−sg(clamp(π_θ/π_base, 0.2, 1.8))·log π_θ."""
    log_p, log_q = (
        x.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1) for x in (logits, base_logits)
    )
    weight = (log_p.detach() - log_q).exp().clamp(0.2, 1.8)
    return (-weight * log_p * mask).sum()


def prift_loss(logits, labels, mask, base_logits):
    """−π_base·log π_θ: the weight does not move with the model."""
    log_p, log_q = (
        x.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1) for x in (logits, base_logits)
    )
    return (-log_q.exp() * log_p * mask).sum()


def prift_mass_loss(logits, labels, mask, base_logits):
    """−1[u ≥ 0.5]·log π_θ, u = Σ_v q(v)·1[q(v) ≤ q(y)] of the base's q."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    q = base_logits.softmax(-1)
    u = torch.where(q <= q.gather(-1, labels[:, None]), q, 0.0).sum(-1)
    return -(torch.where(u >= 0.5, log_p, 0.0) * mask).sum()


def target_loss(logits, labels, mask, base_logits, eta):
    """Cross entropy to p·δ_y + (1 − p)·π̃, π̃ ∝ π_θ^(1−η)·π_T^η, the target a constant."""
    own = logits.log_softmax(-1)
    p = own.detach().exp().gather(-1, labels[:, None])
    guided = ((1 - eta) * logits.detach() + eta * base_logits).softmax(-1)
    target = ((1 - p) * guided).scatter_add(-1, labels[:, None], p)
    return (-(target * own).sum(-1) * mask).sum()


def train(
    model_directory, batches, loss=dft_loss, *, lr=1e-3, clip=1.0, normaliser=None, base=False
):
    """Losses (plain cross entropy a step) and the trained state dict.

    batches: per step, a list of (ids, trained) conversations. normaliser: None for the number of
    supervised tokens, or a function of (Σp, number). base: give the loss the base model's logits.
    """
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    curve = []
    for batch in batches:
        optimizer.zero_grad()
        number, cross_entropy, mass = 0, 0.0, 0.0
        total = torch.zeros(())
        for ids, trained in batch:
            tokens = torch.tensor(ids)
            mask = torch.tensor(trained[1:], dtype=torch.float32)
            logits = model(tokens[None, :-1]).logits[0]
            labels = tokens[1:]
            compared = []
            if base:
                with torch.no_grad():
                    compared = [frozen(tokens[None, :-1]).logits[0]]
            total = total + loss(logits, labels, mask, *compared)
            ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask
            cross_entropy += float(ce.detach().sum())
            mass += float((torch.exp(-ce.detach()) * mask).sum())
            number += int(mask.sum())
        (total / (number if normaliser is None else normaliser(mass, number))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        curve.append(cross_entropy / number)
    return curve, model.state_dict()
