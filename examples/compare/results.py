"""The comparison's figures gathered, and written as Markdown, JSON and one picture."""

import json
import statistics
from pathlib import Path
from typing import Any

import claims
import curves
import sentences
import verdicts
from report import markdown_table, summary
from sizes import command

# field → (column, format)
COLUMNS: dict[str, tuple[str, str]] = {
    "greedy": ("accuracy, greedy", ".1%"),
    "sampled": ("accuracy, sampled", ".1%"),
    "relative_norm": ("‖Δ‖/‖θ₀‖", ".4f"),
    "unchanged_bf16": ("unchanged at bf16", ".1%"),
    "principal_ratio": ("in principal directions, × chance", ".2f"),
    "kl": ("KL, general", ".4f"),
    "kl_task": ("KL, task", ".3f"),
    "sorting": ("sorting kept", ".1%"),
    "old_facts": ("old facts kept", ".1%"),
}
Cell = dict[str, Any]


def matched(curve: list[Cell], score: float) -> Cell | None:
    """The first model of a curve whose greedy accuracy is at least `score`."""
    return next((cell for cell in curve if cell["greedy"] >= score), None)


def _numbers(cells: list[Cell]) -> dict[str, Any]:
    """Of the fields that are a number in every cell: nothing is a share of no changed weights."""
    fields = [f for f in cells[0] if all(isinstance(c[f], int | float) for c in cells)]
    return summary([{f: cell[f] for f in fields} for cell in cells])


def collect(run: Any, sweep: dict[str, dict[float, float]]) -> dict[str, Any]:
    """run: a `compare.Comparison` whose steps are done."""
    measured = [json.loads(run.measured(seed).read_text(encoding="utf-8")) for seed in run.seeds]
    every: dict[str, list[list[Cell]]] = {}
    for name in run.methods:
        every[name] = []
        for seed, found in zip(run.seeds, measured, strict=True):
            rate = run.chosen[name]
            curve = [
                {"step": step, **found["models"][f"{name}@{step}"]}
                for step, _ in run.models(name, seed, rate)
            ]
            curve[-1]["seconds"] = run.steps.seconds(run.run_name(name, seed, rate))
            every[name].append(curve)
    score = measured[0]["base"]["greedy"] + run.set.gain
    tables: dict[str, Any] = {
        "end": {name: _numbers([c[-1] for c in found]) for name, found in every.items()},
        "matched": {},
    }
    for name, found in every.items():
        reached = [matched(curve, score) for curve in found]
        if all(cell is not None for cell in reached):
            tables["matched"][name] = _numbers([{**c, "seconds": 0.0} for c in reached if c])
    last = {name: f"{name}@{run.models(name, 1, run.chosen[name])[-1][0]}" for name in run.methods}
    cosine = measured[0]["cosine"]
    return {
        "format": 1,
        "settings": run.set.__dict__,
        "command": command(run.set),
        "not_run": run.not_run,
        "base": measured[0]["base"],
        "matched_score": score,
        "sweep": {name: {f"{r:g}": s for r, s in scores.items()} for name, scores in sweep.items()},
        "chosen": run.chosen,
        "tables": tables,
        "curves": every,
        "cosine": {a: {b: cosine[last[a]][last[b]] for b in last} for a in last},
        "forgetting": forgetting(every, measured[0]["base"]),
        "claims": verdicts.check(tables),
    }


def forgetting(every: dict[str, list[list[Cell]]], base: Cell) -> dict[str, float | None]:
    """Rank correlation, over all models of all curves, of a figure with the skills lost."""
    cells = [cell for found in every.values() for curve in found for cell in curve]
    lost = [base["sorting"] - c["sorting"] + base["old_facts"] - c["old_facts"] for c in cells]
    fields = ("kl_task", "kl", "relative_norm", "unchanged_bf16", "principal_ratio")
    return {f: verdicts.rank_correlation([c[f] for c in cells], lost) for f in fields}


def _cells(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures[f]['mean']:{form}} ± {figures[f]['spread']:{form}}"
        for f, (_, form) in COLUMNS.items()
    ]


def _score_table(found: dict[str, Any], table: str, wall: bool) -> str:
    head = ["", *(name for name, _ in COLUMNS.values()), *(["seconds"] if wall else [])]
    base = found["base"]
    first = [
        "base",
        *(f"{base[f]:{form}}" if f in base else "" for f, (_, form) in COLUMNS.items()),
    ]
    lines = [[*first, *([""] if wall else [])]]
    for name, figures in found["tables"][table].items():
        seconds = [f"{figures['seconds']['mean']:.0f}"] if wall else []
        lines.append([name, *_cells(figures), *seconds])
    return markdown_table(head, lines)


def _where_table(found: dict[str, Any]) -> str:
    """Shares of ‖Δ‖² of the last models, mean over the seeds."""
    groups = [("layers", k) for k in next(iter(found["curves"].values()))[0][-1]["layers"]]
    groups += [("modules", k) for k in next(iter(found["curves"].values()))[0][-1]["modules"]]
    head = ["", *(f"layer {k}" if g == "layers" and k.isdecimal() else k for g, k in groups)]
    lines = [
        [name, *(f"{statistics.fmean(c[-1][g][k] for c in by_seed):.1%}" for g, k in groups)]
        for name, by_seed in found["curves"].items()
    ]
    return markdown_table(head, lines)


def _cosine_table(found: dict[str, Any]) -> str:
    names = list(found["cosine"])
    lines = [[a, *(f"{found['cosine'][a][b] or 0:.3f}" for b in names)] for a in names]
    return markdown_table(["", *names], lines)


def _claims_table(found: list[dict[str, Any]]) -> str:
    text = claims.as_markdown([c for c in found if c["verdict"] != "not run"])
    rest = "; ".join(c["claim"] for c in found if c["verdict"] == "not run")
    if rest:
        text += f"\n\nNot to be told, as a method did not run or never reached the score: {rest}."
    return text


def markdown(found: dict[str, Any]) -> str:
    """The report; every figure comes from `found`."""
    chosen = found["settings"]
    seeds, models = chosen["seeds"], chosen["snapshots"]
    sweep = [
        [name, *(f"{rate}: {score:.1%}" for rate, score in scores.items())]
        for name, scores in found["sweep"].items()
    ]
    left_out = "; ".join(f"{name}, as {why}" for name, why in found["not_run"].items())
    correlations = ", ".join(
        f"{name} {value:.2f}" for name, value in found["forgetting"].items() if value is not None
    )
    parts = [
        "# Post-training objectives side by side, in miniature",
        f"A Llama of {chosen['layers']} layers, hidden size {chosen['hidden_size']}, pre-trained "
        f"here for {chosen['pretraining_steps']} steps. {chosen['problems']} additions a seed: "
        f"demonstrations with {chosen['wrong']:.0%} wrong sums for SFT and DFT; "
        f"{chosen['samples']} own samples each, verified, for RFT, offline DFT, RIFT and DPO; the "
        f"verifier's reward for GRPO (TRL) and ES. {chosen['steps']} steps of {chosen['batch']} "
        f"rows (GRPO: {chosen['grpo_steps']} of {chosen['batch']} completions; ES: "
        f"{chosen['iterations']} iterations of {chosen['population']} members on "
        f"{chosen['es_prompts']} prompts, α = σ/2; es+anchor: αλ = {chosen['anchor']:g}). Scored "
        f"on {chosen['test_problems']} additions that no training has seen. {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}: mean ± sample standard deviation.",
        *([f"Left out: {left_out}."] if left_out else []),
        f"Made by `{found['command']}`.",
        "![greedy accuracy along the curves](RESULTS.png)",
        "## At the end of training",
        sentences.end(found),
        "Sampled: the probability that an answer drawn at temperature 1 is right, exactly. KL on "
        "the task: KL(base ‖ tuned) of the base's own answers, nats an answer. In principal "
        "directions: the share of ‖Δ‖² in the base's 8 leading singular directions of both sides, "
        "over what a random update would have there (0: nothing moved). Seconds: the run's "
        "process, its start included.",
        _score_table(found, "end", wall=True),
        f"## At matched score: the first of {models} models with greedy accuracy of at least "
        f"{found['matched_score']:.1%}",
        sentences.matched(found),
        _score_table(found, "matched", wall=False),
        "## Where the update lies: shares of ‖Δ‖²",
        sentences.where(found),
        _where_table(found),
        "## Cosines between the updates (first seed)",
        sentences.cosines(found),
        _cosine_table(found),
        "## What predicts what is forgotten",
        "Rank correlation, over all models of all curves, with the sorting and old facts lost: "
        f"{correlations or 'nothing was lost'}. {sentences.forgetting(found)}".rstrip(),
        "## Are the claims seen here?",
        sentences.claims(found),
        _claims_table(found["claims"]),
        "## Sweeps: greedy accuracy on other problems, first seed (σ for ES, else learning rates)",
        sentences.sweep(found),
        markdown_table(["", *([""] * max(map(len, found["sweep"].values())))], [
            row + [""] * (1 + max(map(len, found["sweep"].values())) - len(row)) for row in sweep
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def write(out: Path, found: dict[str, Any]) -> None:
    """RESULTS.md, RESULTS.json and RESULTS.png in `out`."""
    for name, content in (
        ("RESULTS.png", curves.draw(found)),
        ("RESULTS.json", json.dumps(found, indent=1, allow_nan=False).encode()),
        ("RESULTS.md", markdown(found).encode()),
    ):
        partial = out / (name + ".part")
        partial.write_bytes(content)
        partial.replace(out / name)
