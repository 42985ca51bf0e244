"""Is DFT the right loss for this data? The base model's probabilities of the tokens to be taught.

A token's gradient in logit space is w·(softmax − onehot) with w = 1 (SFT) or w = p (DFT,
arXiv 2508.05629), and ‖softmax − onehot‖₂² = 1 − 2p + Σ_k p_k². Thresholds on the mean probability:
arXiv 2510.00526. Low probability with low entropy means that the model is sure of something
else (an outlier, or a contradiction); with high entropy, that it does not know.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_dft.drift.scoring import TokenScores

LOW = 0.1  # the probability below which a token counts as unlikely
SURE_NATS = 1.0  # an entropy below this leaves fewer than e equally likely alternatives
STRONG, WEAK = 0.5, 0.1  # mean probability above which DFT, below which SFT is the better loss
OUTLIERS = 0.3  # between them: share of unlikely tokens where the model is sure of something else
BINS = 20
PLACES = ((0, 1), (1, 4), (4, 16), (16, 64), (64, 256), (256, 1 << 30))
_LISTED = 25


def token_class(text: str, special: bool) -> str:
    """One of special, space, number, word, word part, symbol, from a token's decoded text."""
    if special:
        return "special"
    body = text.strip()
    if not body:
        return "space"
    if any(c.isdigit() for c in body):
        return "number"
    if any(c.isalpha() for c in body):
        return "word" if text[0].isspace() else "word part"
    return "symbol"


def place_name(low: int, high: int) -> str:
    """How reports call the answer tokens [low, high), counted from 1."""
    if high - low == 1:
        return f"{high}"
    return f"{low + 1}–{high}" if high < 1 << 30 else f"{low + 1}+"


class _Tokens:
    """All scored tokens, concatenated."""

    def __init__(self, scores: Sequence[TokenScores]):
        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(s, name) for s in scores])

        self.target, self.place, self.top = column("target"), column("place"), column("top")
        self.prob = column("prob").astype(np.float64)
        self.entropy = column("entropy").astype(np.float64)
        self.top_prob = column("top_prob").astype(np.float64)
        sum_sq = column("sum_sq").astype(np.float64)
        # Rounding can push a certain token's 1 - 2p + Σp² below zero.
        self.sft = np.sqrt(np.clip(1 - 2 * self.prob + sum_sq, 0, None))
        self.dft = self.prob * self.sft


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    total = float(whole.sum())
    return float(part.sum()) / total if total else None


def _group(tokens: _Tokens, chosen: np.ndarray) -> dict[str, Any]:
    """The numbers of one group of tokens; `chosen`: bool [K], at least one True."""
    prob, low = tokens.prob[chosen], tokens.prob[chosen] < LOW
    sure = tokens.entropy[chosen] < SURE_NATS
    histogram, _ = np.histogram(prob, bins=BINS, range=(0.0, 1.0))
    return {
        "tokens": int(chosen.sum()),
        "mean_prob": float(prob.mean()),
        "cross_entropy": float(-np.log(np.maximum(prob, 1e-45)).mean()),
        "mean_entropy": float(tokens.entropy[chosen].mean()),
        "low": float(low.mean()),
        "low_sure": float((low & sure).mean()),
        "low_unsure": float((low & ~sure).mean()),
        "low_sft_gradient": _share(tokens.sft[chosen][low], tokens.sft[chosen]),
        "low_dft_gradient": _share(tokens.dft[chosen][low], tokens.dft[chosen]),
        "histogram": histogram.tolist(),
    }


def _listing(tokens: _Tokens, chosen: np.ndarray, text_of: Callable[[int], str]) -> list[Any]:
    """Tokens of `chosen`, most frequent first, with what the model would rather have said."""
    ids, counts = np.unique(tokens.target[chosen], return_counts=True)
    rows = []
    for i in np.argsort(-counts, kind="stable")[:_LISTED]:
        here = chosen & (tokens.target == ids[i])
        tops, often = np.unique(tokens.top[here], return_counts=True)
        rows.append(
            {
                "id": int(ids[i]),
                "text": text_of(int(ids[i])),
                "count": int(counts[i]),
                "mean_prob": float(tokens.prob[here].mean()),
                "mean_entropy": float(tokens.entropy[here].mean()),
                "instead": text_of(int(tops[often.argmax()])),
                "instead_prob": float(tokens.top_prob[here].mean()),
            }
        )
    return rows


def diagnose(
    scores: Sequence[TokenScores],
    text_of: Callable[[int], str],
    special: frozenset[int],
    ends: Sequence[int] = (),
) -> dict[str, Any]:
    """The whole diagnosis as plain dicts, ready for JSON.

    `text_of`: token id → its decoded text; `special`: ids of special tokens; `ends`: those that end
    an answer. Raises ValueError where there is no token.
    """
    if not scores or not sum(len(s.target) for s in scores):
        raise ValueError("the data has no supervised token; check its assistant turns")
    tokens = _Tokens(scores)
    everything = np.ones(len(tokens.target), dtype=bool)
    ids, inverse = np.unique(tokens.target, return_inverse=True)
    classes = np.array([token_class(text_of(int(i)), int(i) in special) for i in ids])[inverse]
    frequency = np.bincount(inverse)[inverse]
    low, sure = tokens.prob < LOW, tokens.entropy < SURE_NATS
    overall = _group(tokens, everything)
    # An end-of-turn token is no knowledge: in short answers it would lift the mean past any level.
    said = classes != "special"
    words = _group(tokens, said) if said.any() else overall
    # Rare: each occurrence among those ids that together make up the rarest tenth of the data.
    rare = frequency <= np.quantile(frequency, 0.1)
    is_end = np.isin(tokens.target, np.array(ends, dtype=np.int64))
    at_ends = _group(tokens, is_end) if is_end.any() else None
    return {
        "overall": overall,
        "without_special": words,
        "ends": at_ends,
        "places": {
            place_name(a, b): _group(tokens, here)
            for a, b in PLACES
            if (here := (tokens.place >= a) & (tokens.place < b)).any()
        },
        "classes": {str(c): _group(tokens, classes == c) for c in sorted(set(classes))},
        "confidently_wrong": _listing(tokens, low & sure, text_of),
        "missing_knowledge": _listing(tokens, low & ~sure, text_of),
        "rare_but_right": _listing(tokens, rare & (tokens.prob > STRONG), text_of),
        "map": _map(tokens),
        "recommendation": recommend(words) | weigh_ends(at_ends),
    }


def _map(tokens: _Tokens) -> dict[str, Any]:
    """Counts over probability (rows) and entropy in nats (columns): the entropy plot's data."""
    top = max(float(tokens.entropy.max()), 1e-6)
    counts, _, edges = np.histogram2d(
        tokens.prob, tokens.entropy, bins=(BINS, 24), range=((0, 1), (0, top))
    )
    return {"counts": counts.astype(int).tolist(), "entropy_edges": edges.tolist()}


def weigh_ends(ends: dict[str, Any] | None) -> dict[str, str]:
    """{"ends": what DFT's weight means for the tokens that end an answer}; nothing where they are
    likely already."""
    if ends is None or ends["mean_prob"] >= STRONG:
        return {}
    return {
        "ends": f"The base gives the tokens that end an answer a mean probability of "
        f"{ends['mean_prob']:.3f}. A loss that weighs by it teaches them slowly, and the model may "
        "never learn to stop: add --dft-full-weight end to any --loss but sft."
    }


def recommend(overall: dict[str, Any]) -> dict[str, str]:
    """{"loss": sft | dft | dft-mix | asft, "reason": …} from the numbers of all words.

    Outside the published thresholds the kind of unlikely token decides; that part is a heuristic
    of this tool and says so.
    """
    mean, low = overall["mean_prob"], overall["low"]
    outliers = overall["low_sure"] / low if low else 0.0
    found = (
        f"The base gives the answers' tokens, special ones left out, a mean probability of "
        f"{mean:.3f}. "
    )
    if mean > STRONG:
        loss = "dft"
        reason = (
            f"Above {STRONG} the prior is strong: DFT learns from what the model nearly knows and "
            f"leaves alone the {low:.1%} of tokens below {LOW}, which take "
            f"{overall['low_sft_gradient'] or 0:.0%} of SFT's gradient. If the base is already "
            "instruction-tuned and must keep its skills, asft adds an anchor to it."
        )
    elif mean < WEAK:
        loss = "sft"
        reason = (
            f"Below {WEAK} the data is new to the model: DFT weights each token by that "
            "probability and would hardly learn it."
        )
    elif outliers >= OUTLIERS:
        loss = "asft"
        reason = (
            f"Between {WEAK} and {STRONG} neither loss wins as a rule. In {outliers:.0%} of the "
            f"unlikely tokens the model is sure of something else (entropy below {SURE_NATS} nat): "
            "conflicts with what it knows, so weight by p and anchor to the base (a heuristic)."
        )
    else:
        loss = "dft-mix"
        reason = (
            f"Between {WEAK} and {STRONG} neither loss wins as a rule. Of the unlikely tokens, "
            f"{1 - outliers:.0%} have high entropy: missing knowledge, which DFT alone would "
            "starve; the mix keeps part of SFT's gradient (a heuristic)."
        )
    return {"loss": loss, "reason": found + reason}
