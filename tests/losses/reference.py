"""Dense float64 references of the family, written from the formulas, differentiated by autograd."""

import torch
from torch import Tensor

# Parameters under test: none at a default that makes the objective another one.
PARAMETERS: dict[str, dict] = {
    "sft": {},
    "dft": {},
    "dft-sequence": {},
    "dft-geometric": {},
    "dft-mix": {"alpha": 0.3},
    "dft-floor": {"floor": 0.15},
    "p-alpha": {"alpha": 0.4},
    "nll-threshold": {"threshold": 0.05},
    "dcr": {"tau": 0.2},
    "talr": {"floor": 0.02},
    "chord-phi": {},
    "iw-sft": {"low": 0.3, "high": 1.7},
    "iw-sft/sequence": {"level": "sequence", "temperature": 1.5},
    "psft": {"clip": 0.2},
    "asft": {"kl_weight": 0.7},
    "eaft": {"exponent": 1.5},
    "deft": {},
    "idft": {"beta": 0.8, "low": 0.2, "high": 1.6},
    "target-sft": {"eta": 0.3},
    "rift": {},
    "rift/sequence": {"level": "sequence"},
    "dpo": {"beta": 0.7, "label_smoothing": 0.1},
    "dpo/mean": {"beta": 2.0, "log_probs": "mean"},
    "dft/reference": {"weight_from": "reference"},
    "dft-geometric/reference": {"weight_from": "reference"},
    "p-alpha/reference": {"weight_from": "reference", "alpha": 0.4},
    "asft/reference": {"weight_from": "reference", "kl_weight": 0.7},
}
_COMPARED = ("iw-sft", "iw-sft/sequence", "psft", "asft", "eaft", "deft", "idft", "target-sft")
# Their gradient has p − q in it.
HAS_KL = ("asft", "asft/reference", "target-sft")
# One of each kind of statistics, for what is slow: the interpreted kernels.
KINDS = [n for n in PARAMETERS if "/" not in n or n in ("iw-sft/sequence", "dft/reference")]
_ROWS = ("rift", "rift/sequence", "dpo", "dpo/mean")
P_ONLY = [n for n in PARAMETERS if n not in (*_COMPARED, *_ROWS) and "/reference" not in n]


def rewards(segments: Tensor) -> Tensor:
    """A reward of each conversation, of either sign, for its tokens."""
    return 0.8 * (-1.3) ** segments.double()


def data_stats(segments: Tensor, log_ref: Tensor) -> dict[str, Tensor]:
    """What a loss is told of its tokens: conversation, reference's log p, reward; of log_ref's
    dtype."""
    reward = rewards(segments).to(log_ref)
    return {"segment_ids": segments, "reference_log_prob": log_ref, "reward": reward}


def _per_conversation(values: Tensor, segments: Tensor, mask: Tensor, mean: bool) -> Tensor:
    out = torch.zeros_like(values)
    for segment in segments.unique():
        member = (segments == segment) & mask
        total = values[member].sum()
        out[segments == segment] = total / max(int(member.sum()), 1) if mean else total
    return out


def _of_whole(share: Tensor, log_p: Tensor, mask: Tensor) -> Tensor:
    """Token values with the gradient that the sum of them all has by each token's log p: a token's
    own upstream gradient scales its own part."""
    whole = torch.where(mask, share, 0.0).sum()
    if not whole.requires_grad:
        return share.detach() + 0.0 * log_p
    (slope,) = torch.autograd.grad(whole, log_p, retain_graph=True)
    return share.detach() + slope * (log_p - log_p.detach())


def entropy_of_top(log_probs: Tensor, k: int = 20) -> Tensor:
    """Entropy of the k likeliest tokens, renormalised."""
    top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1).values
    top = top - top.logsumexp(-1, keepdim=True)
    return -(top.exp() * top).sum(-1)


def dense_loss(
    name: str,
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    segments: Tensor,
    reference_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss [T], target log-probabilities [T]) of fp64 logits [T, V]; ignored tokens give 0."""
    v = PARAMETERS[name]
    log_probs = logits.log_softmax(-1)
    ref_log_probs = reference_logits.log_softmax(-1)
    safe = torch.where(mask, target, 0).unsqueeze(-1)
    log_p = log_probs.gather(-1, safe).squeeze(-1)
    log_ref = ref_log_probs.gather(-1, safe).squeeze(-1)
    p = log_p.exp()
    w = None
    match name:
        case "sft":
            loss = -log_p
        case "dft":
            w = p
        case "dft-sequence":
            w = _per_conversation(log_p, segments, mask, mean=False).exp()
        case "dft-geometric":
            w = _per_conversation(log_p, segments, mask, mean=True).exp()
        case "dft-mix":
            w = v["alpha"] * p + 1 - v["alpha"]
        case "dft-floor":
            w = torch.maximum(p, torch.tensor(v["floor"], dtype=p.dtype))
        case "p-alpha":
            loss = (1 - p ** v["alpha"]) / v["alpha"]
        case "nll-threshold":
            w = (p >= v["threshold"]).double()
        case "dcr":
            w = torch.where(p < v["tau"], p, torch.ones_like(p))
        case "talr":
            tau = (-log_p[mask]).median() if mask.any() else 1.0
            w = (p ** (1 / tau)).clamp(min=v["floor"])
        case "chord-phi":
            w = p * (1 - p)
        case "iw-sft":
            w = (p / log_ref.exp()).clamp(v["low"], v["high"])
        case "iw-sft/sequence":
            mean = _per_conversation(log_p - log_ref, segments, mask, mean=True)
            w = (v["temperature"] * mean).exp().clamp(0, 16)
        case "psft":
            r = p / log_ref.exp()
            loss = -torch.minimum(r, r.clamp(0.8, 1 + v["clip"]))
        case "asft":
            kl = (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1)
            loss = -p.detach() * log_p + v["kl_weight"] * kl
        case "idft":
            entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
            gamma = (-(log_p + entropy) / v["beta"]).exp().clamp(v["low"], v["high"])
            w = p**gamma
        case "target-sft":
            share = v["eta"]
            guided = log_probs.exp() ** (1 - share) * ref_log_probs.exp() ** share
            target_q = (1 - p)[:, None] * guided / guided.sum(-1, keepdim=True)
            target_q = target_q.detach().scatter_add(-1, safe, p.detach().unsqueeze(-1))
            loss = -(target_q * log_probs).sum(-1)
            # Reported without the part that is constant.
            guided = guided / guided.sum(-1, keepdim=True)
            loss = loss + ((1 - p) * torch.special.xlogy(guided, guided).sum(-1)).detach()
        case "rift" | "rift/sequence":
            r = rewards(segments)
            likely, n = p, torch.ones_like(p)
            if name == "rift/sequence":
                likely = _per_conversation(log_p, segments, mask, mean=False).exp()
                n = _per_conversation(torch.ones_like(p), segments, mask, mean=False)
            loss = torch.where(r > 0, -r * log_p, -r * likely / n)
            if name == "rift/sequence":
                loss = _of_whole(loss, log_p, mask)
        case "dpo" | "dpo/mean":
            scores, pairs = {}, []
            for segment in segments.unique().tolist():
                own = (log_p - log_ref)[(segments == segment) & mask]
                if len(own):
                    scores[segment] = own.mean() if name == "dpo/mean" else own.sum()
            share = torch.zeros_like(p)
            for segment in (s for s in scores if s % 2 == 0 and s + 1 in scores):
                margin = v["beta"] * (scores[segment] - scores[segment + 1])
                smooth = v.get("label_smoothing", 0.0)
                pairs.append(
                    -(1 - smooth) * torch.sigmoid(margin).log()
                    - smooth * torch.sigmoid(-margin).log()
                )
                member = ((segments == segment) | (segments == segment + 1)) & mask
                share = share + member.double() / member.sum() * pairs[-1]
            loss = _of_whole(share, log_p, mask)
        case "dft/reference":
            w = log_ref.exp()
        case "dft-geometric/reference":
            w = _per_conversation(log_ref, segments, mask, mean=True).exp()
        case "p-alpha/reference":
            w = log_ref.exp() ** v["alpha"]
        case "asft/reference":
            kl = (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1)
            loss = -log_ref.exp().detach() * log_p + v["kl_weight"] * kl
        case "eaft":
            w = (entropy_of_top(log_probs) / 3.0) ** v["exponent"]
        case "deft":
            alpha = log_probs.exp().square().sum(-1).detach()
            loss = (1 - p**alpha) / alpha
    if w is not None:
        loss = -w.detach() * log_p
    return torch.where(mask, loss, 0.0), log_p


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest error of a row as a share of that row's largest entry (1-D: of the largest entry)."""
    ours, exact = ours.double(), exact.double()
    if not exact.numel():
        return 0.0
    scale = exact.abs().amax(-1, keepdim=True)
    # A row that ought to be 0 has to be 0.
    return float(((ours - exact).abs() / scale.clamp(min=1e-30)).max())
