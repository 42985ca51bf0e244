"""The figures of a report's row, in the order in which tables and drift.csv show them."""

from typing import Any

MODEL = (
    "parameters",
    "base_norm",
    "update_norm",
    "relative_norm",
    "max_abs",
    "mean",
    "mean_abs",
    "unchanged",
    "unchanged_bf16",
    "unchanged_1e-5",
    "unchanged_rel_1e-5",
    "near_zero",
    "changed_near_zero",
    "top1pct_share",
    "gini",
)
SPECTRAL = ("sigma1", "sigma1_error", "stable_rank", "top_singular_share", "top4_singular_share")
SHARES = ("left", "right", "both", "residual", "left_chance", "right_chance", "both_chance")


def principal_ks(report: dict[str, Any]) -> list[str]:
    """The k of the report's principal subspaces, as text, rising; none where they were left out."""
    found: set[str] = set()
    for method in report["methods"].values():
        found |= set((method["model"]["principal"] or {}).get("k", ()))
    return sorted(found, key=int)


def principal(row: dict[str, Any], k: str, share: str) -> float | None:
    """One share of one row; None where it was not measured."""
    measured = row.get("principal")
    return measured["k"][k][share] if measured else None
