"""All figures of one seed's models, in one process.

    python examples/compare/measure.py --base BASE --models LABEL=DIR… --general FILE --task FILE
        --problems N --out FILE

Answers are scored exactly (`answers`), the distance from the base by the product's own functions
behind `megatron-dft drift` and `retention`. FILE: {"base": figures, "models": label → figures,
"cosine": label → label → cosine of the updates}.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))

import answers
import corpus

from megatron_dft.commands.drift import compare
from megatron_dft.data import scored_text
from megatron_dft.drift import sampling
from megatron_dft.drift.retention import measure
from megatron_dft.drift.scoring import load_model, windows

K = 8  # leading singular directions
_MOVED = ("relative_norm", "unchanged_bf16", "unchanged", "changed_near_zero")


def answered(model: Any, problems: int) -> dict[str, float]:
    """The task's score, and what is left of the two skills that no tuning shows."""
    scores = answers.score(model, corpus.clean_sums(problems))
    for name, rows in (
        ("sorting", corpus.sorting_problems(problems)),
        ("old_facts", corpus.old_facts()),
    ):
        scores[name] = answers.score(model, rows)["greedy"]
    return scores


def moved(methods: dict[str, Any]) -> dict[str, Any]:
    """Of one method in `drift`'s report: how far, how sparsely, where."""
    figures = {name: methods["model"][name] for name in _MOVED}
    found = methods["model"]["principal"]  # None where nothing moved, which is in no direction
    shares = found["k"][str(K)] if found else {"both": 0.0, "both_chance": 1.0}
    figures["principal"] = shares["both"]
    # 1: as much as an update in no direction of its own would have there.
    figures["principal_ratio"] = shares["both"] / shares["both_chance"]
    whole = methods["model"]["update_norm"] ** 2
    for kind in ("layers", "modules"):
        norms = {name: group["update_norm"] for name, group in methods[kind].items()}
        figures[kind] = {name: n**2 / whole if whole else 0.0 for name, n in norms.items()}
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="LABEL=DIR")
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--problems", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    models = {label: Path(path) for label, _, path in (m.partition("=") for m in args.models)}
    base = load_model(args.base)
    tokenizer = scored_text.tokenizer_of(args.base, chat=False)
    general = list(windows(scored_text.plain_text(args.general, tokenizer), 64))
    rows = scored_text.conversations([str(args.task)], tokenizer, "--task")
    prompts = sampling.prompts_of(rows, args.problems)
    own = sampling.sample_answers(base, prompts, sampling.end_ids(base, tokenizer), 8)
    drift = compare(args.base, list(models.values()), list(models), 1, [K])
    found = {}
    for label, path in models.items():
        model = load_model(path)
        found[label] = {
            **answered(model, args.problems),
            **moved(drift["methods"][label]),
            "kl": measure(base, model, general)["kl"],
            "kl_task": measure(base, model, own)["kl_sequence"],
        }
    labels, cosine = drift["agreement"]["labels"], drift["agreement"]["model"]["cosine"]
    result = {
        "base": answered(base, args.problems),
        "models": found,
        "cosine": {
            a: dict(zip(labels, row, strict=True)) for a, row in zip(labels, cosine, strict=True)
        },
    }
    args.out.write_text(json.dumps(result, indent=1, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
