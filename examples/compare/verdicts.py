"""What is claimed of the methods, held against the comparison's figures seed by seed."""

from typing import Any

# (claim, source, table, field, the method said to have more, the one said to have less, factor:
# `more` is to exceed factor · `less`)
CLAIMS = (
    ("offline DFT beats RFT (sampled accuracy)",
     "2508.05629", "end", "sampled", "offline-dft", "rft", 1),
    ("offline DFT beats DPO (sampled accuracy)",
     "2508.05629", "end", "sampled", "offline-dft", "dpo", 1),
    ("offline DFT beats GRPO (sampled accuracy)",
     "2508.05629", "end", "sampled", "offline-dft", "grpo", 1),
    ("DFT beats SFT on demonstrations (sampled accuracy)",
     "2508.05629", "end", "sampled", "dft", "sft", 1),
    ("rewards of wrong samples help: RIFT beats RFT (sampled accuracy)",
     "2601.09253", "end", "sampled", "rift", "rft", 1),
    ("GRPO leaves more weights unchanged than SFT (at bf16), at the end",
     "2505.11711", "end", "unchanged_bf16", "grpo", "sft", 1),
    ("GRPO leaves more weights unchanged than SFT (at bf16), at matched score",
     "2505.11711", "matched", "unchanged_bf16", "grpo", "sft", 1),
    ("DPO leaves more weights unchanged than SFT (at bf16), at the end",
     "2505.11711", "end", "unchanged_bf16", "dpo", "sft", 1),
    ("SFT's update lies in the base's principal directions more than GRPO's",
     "2511.08567", "matched", "principal_ratio", "sft", "grpo", 1),
    ("ES moves the weights further than GRPO, at matched score",
     "2601.20861", "matched", "relative_norm", "es", "grpo", 1),
    ("ES moves them ten times as far as GRPO, at matched score",
     "2601.20861", "matched", "relative_norm", "es", "grpo", 10),
    ("ES's update is denser than GRPO's (at bf16)",
     "2601.20861", "matched", "unchanged_bf16", "grpo", "es", 1),
    ("ES forgets more than GRPO: larger KL on general text, at matched score",
     "2601.20861", "matched", "kl", "es", "grpo", 1),
    ("anchored weight decay lowers ES's drift",
     "2605.30148", "end", "relative_norm", "es", "es+anchor", 1),
    ("anchored weight decay lowers ES's KL on general text",
     "2605.30148", "end", "kl", "es", "es+anchor", 1),
    ("anchored weight decay costs ES no score: within 5 % (greedy accuracy)",
     "2605.30148", "end", "greedy", "es+anchor", "es", 0.95),
    ("on the task itself GRPO's KL is larger than ES's, at matched score",
     "2605.30148", "matched", "kl_task", "grpo", "es", 1),
    ("DFT moves the weights less than SFT, at matched score",
     "open question", "matched", "relative_norm", "sft", "dft", 1),
    ("offline DFT has a smaller KL on general text than SFT, at matched score",
     "open question", "matched", "kl", "sft", "offline-dft", 1),
    ("offline DFT has a smaller KL on general text than GRPO, at matched score",
     "open question", "matched", "kl", "grpo", "offline-dft", 1),
)  # fmt: skip


def check(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with the differences by seed and a verdict; "not run" where a method is missing.

    "yes" where every seed shows it, "no" where none does, else "unclear".
    """
    found = []
    for text, source, table, field, more, less, factor in CLAIMS:
        row: dict[str, Any] = {"claim": text, "source": source, "field": field}
        row |= {"table": table, "more": [more, None], "less": [less, None], "verdict": "not run"}
        methods = tables[table]
        if {more, less} <= methods.keys():
            a, b = (methods[name][field] for name in (more, less))
            gaps = [x - factor * y for x, y in zip(a["values"], b["values"], strict=True)]
            verdict = "yes" if min(gaps) > 0 else "no" if max(gaps) <= 0 else "unclear"
            row |= {"more": [more, a["mean"]], "less": [less, b["mean"]]}
            row |= {"differences": gaps, "verdict": verdict}
        found.append(row)
    return found


def ranks(values: list[float]) -> list[float]:
    """From 0; equal values share the mean of theirs."""
    order = sorted(values)
    return [(2 * order.index(v) + order.count(v) - 1) / 2 for v in values]


def rank_correlation(x: list[float], y: list[float]) -> float | None:
    """Spearman's ρ; None where one of them does not vary."""
    a, b = ranks(x), ranks(y)
    mean = (len(a) - 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    bottom = sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b)
    return top / bottom**0.5 if bottom else None
