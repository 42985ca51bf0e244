"""What is claimed of the methods, held against the study's figures seed by seed."""

from typing import Any

# (claim, source, task, field, the method said to have more, the one said to have less)
CLAIMS = (
    ("DFT beats SFT where the prior is strong and demonstrations are noisy (sampled accuracy)",
     "2508.05629", "sums", "sampled", "dft", "sft"),
    ("the same, greedy accuracy", "2508.05629", "sums", "greedy", "dft", "sft"),
    ("DFT improves on the base there (sampled accuracy)",
     "2508.05629", "sums", "sampled", "dft", "base"),
    ("asft beats DFT there (sampled accuracy)",
     "2509.23753", "sums", "sampled", "asft", "dft"),
    ("SFT learns new facts better than DFT (greedy recall)",
     "2510.00526", "facts", "greedy", "sft", "dft"),
    ("a mix with SFT's loss learns more new facts than DFT alone",
     "Lauorie/DFT", "facts", "greedy", "dft-mix", "dft"),
    ("SFT moves the weights further than DFT, (a)",
     "open question", "sums", "relative_norm", "sft", "dft"),
    ("SFT moves the weights further than DFT, (b)",
     "open question", "facts", "relative_norm", "sft", "dft"),
    ("DFT keeps general text better than SFT, (a): SFT has the larger KL",
     "open question", "sums", "kl", "sft", "dft"),
    ("DFT keeps general text better than SFT, (b): SFT has the larger KL",
     "open question", "facts", "kl", "sft", "dft"),
    ("asft's anchor lowers DFT's KL to the base on the task, (a)",
     "2509.23753", "sums", "kl_task", "dft", "asft"),
    ("asft's anchor lowers DFT's KL to the base on the task, (b)",
     "2509.23753", "facts", "kl_task", "dft", "asft"),
    ("L2-SP lowers SFT's drift, (a)", "1802.01483", "sums", "relative_norm", "sft", "sft+l2sp"),
    ("L2-SP lowers SFT's drift, (b)", "1802.01483", "facts", "relative_norm", "sft", "sft+l2sp"),
    ("L2-SP keeps more old facts than SFT, (b)",
     "1802.01483", "facts", "old_facts", "sft+l2sp", "sft"),
)  # fmt: skip


def check(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim whose methods were run, with the differences by seed and a verdict.

    "yes" where every seed shows the claimed sign, "no" where every seed shows the other, else
    "unclear": with three seeds nothing finer can be said.
    """
    found = []
    for text, source, task, field, more, less in CLAIMS:
        methods = tables[task]
        if not {more, less} <= methods.keys():
            continue
        pairs = zip(methods[more][field]["values"], methods[less][field]["values"], strict=True)
        gaps = [a - b for a, b in pairs]
        verdict = "yes" if min(gaps) > 0 else "no" if max(gaps) < 0 else "unclear"
        found.append(
            {
                "claim": text,
                "source": source,
                "field": field,
                "more": [more, methods[more][field]["mean"]],
                "less": [less, methods[less][field]["mean"]],
                "differences": gaps,
                "verdict": verdict,
            }
        )
    return found


def as_markdown(found: list[dict[str, Any]]) -> str:
    lines = ["| claim | source | here | verdict |", "| --- | --- | --- | --- |"]
    for row in found:
        here = " against ".join(f"{name} {value:.4g}" for name, value in (row["more"], row["less"]))
        lines.append(f"| {row['claim']} | {row['source']} | {here} | {row['verdict']} |")
    note = "yes / no: every seed shows the claimed sign / the other one; unclear: they differ."
    return "\n".join([*lines, "", note])
