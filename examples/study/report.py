"""The study's figures gathered, and written as Markdown, JSON and one picture."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import answers
import claims
import corpus
import picture

TITLES = {
    "sums": "(a) additions, a strong prior, wrong demonstrations",
    "facts": "(b) new facts, which the base cannot know",
}
# field → (column, format). Accuracies are on the task: held-out sums, or the facts trained on.
COLUMNS: dict[str, tuple[str, str]] = {
    "greedy": ("accuracy, greedy", ".1%"),
    "sampled": ("accuracy, sampled", ".1%"),
    "cross_entropy": ("plain CE", ".3f"),
    "relative_norm": ("‖Δ‖/‖θ₀‖", ".4f"),
    "unchanged_bf16": ("unchanged at bf16", ".1%"),
    "perplexity": ("perplexity, general", ".3f"),
    "kl": ("KL(base ‖ tuned), general", ".4f"),
    "sorting": ("sorting kept", ".1%"),
    "old_facts": ("old facts kept", ".1%"),
    "sums": ("additions kept", ".1%"),
}
Cell = dict[str, float]


def _answers(directory: Path, task: str, out: Path, seed: int, problems: int) -> Cell:
    model = answers.load(directory)
    # Made anew from the seed, as the data files were.
    facts_file = out / "data" / f"facts-{seed}.jsonl"
    facts = [json.loads(line) for line in facts_file.read_text().splitlines()]
    sums = corpus.clean_sums(problems)
    cell = answers.score(model, sums if task == "sums" else facts)
    for name, rows in (
        ("sorting", corpus.sorting_problems(problems)),
        ("old_facts", corpus.old_facts()),
        ("sums", sums),
    ):
        cell[name] = answers.score(model, rows)["greedy"]
    return cell


def summary(cells: list[Cell]) -> dict[str, Any]:
    """field → mean, spread (sample standard deviation over the seeds; 0 of one), values."""
    return {
        field: {
            "mean": statistics.fmean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": values,
        }
        for field in cells[0]
        if (values := [cell[field] for cell in cells])
    }


def collect(
    out: Path,
    base: Path,
    chosen: Any,
    tasks: Sequence[str],
    swept: Sequence[str],
    name_of: Callable[..., str],
) -> dict[str, Any]:
    """Every cell of the tables: tasks → methods (and "base") → field → mean, spread, values."""
    seeds = range(1, chosen.seeds + 1)
    problems = chosen.test_problems
    table: dict[str, Any] = {}
    for task in tasks:
        lens = {
            (half, seed): json.loads((out / "lens" / f"{task}-{seed}" / f"{half}.json").read_text())
            for half in ("drift", "retention")
            for seed in seeds
        }
        table[task] = {}
        for method in chosen.methods:
            cells = []
            for seed in seeds:
                tuned = out / "tuned" / name_of(task, method, seed)
                cell = _answers(tuned, task, out, seed, problems)
                moved = lens["drift", seed]["methods"][method]["model"]
                kept = lens["retention", seed]["methods"][method]
                cell |= {f: moved[f] for f in ("update_norm", "relative_norm", "unchanged_bf16")}
                cell |= {f: kept["general"][f] for f in ("perplexity", "kl", "top1_agreement")}
                cell["kl_task"] = kept["task"]["kl"]
                cells.append(cell)
            table[task][method] = summary(cells)
        of_base = []
        for seed in seeds:
            cell = _answers(base, task, out, seed, problems)
            first = lens["retention", seed]["methods"][chosen.methods[0]]["general"]
            cell |= {"relative_norm": 0.0, "unchanged_bf16": 1.0, "kl": 0.0}
            of_base.append(cell | {"perplexity": first["base_perplexity"]})
        table[task]["base"] = summary(of_base)
    sweep: dict[str, Any] = {}
    for task in tasks if chosen.sweep else ():
        sweep[task] = {}
        for method in swept:
            # The main runs' first seed is one point of it.
            first = {field: s["values"][0] for field, s in table[task][method].items()}
            rates = {f"{chosen.lr:g}": first}
            for lr in chosen.sweep:
                tuned = out / "tuned" / name_of(task, method, 1, lr)
                rates[f"{lr:g}"] = _answers(tuned, task, out, 1, problems)
            sweep[task][method] = rates
    diagnosis = {
        task: json.loads((out / "diagnosis" / task / "diagnosis.json").read_text())
        for task in tasks
    }
    return {
        "format": 1,
        "tables": table,
        "sweep": sweep,
        "diagnosis": {
            task: {
                "mean_prob": found["without_special"]["mean_prob"],
                "low": found["without_special"]["low"],
                "low_sft_gradient": found["without_special"]["low_sft_gradient"],
                "loss": found["recommendation"]["loss"],
            }
            for task, found in diagnosis.items()
        },
        "claims": claims.check(table),
    }


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _result_table(methods: dict[str, Any], task: str) -> str:
    # On additions "additions kept" is the accuracy itself.
    columns = {f: c for f, c in COLUMNS.items() if not (task == "sums" and f == "sums")}
    order = ["base", *(m for m in methods if m != "base")]
    rows = []
    for method in order:
        cells = [method]
        for field, (_, form) in columns.items():
            figure = methods[method][field]
            text = format(figure["mean"], form)
            if method != "base":
                text += " ± " + format(figure["spread"], form)
            cells.append(text)
        rows.append(cells)
    return markdown_table(["", *(name for name, _ in columns.values())], rows)


def _sweep_table(sweep: dict[str, Any]) -> str:
    rates = sorted(next(iter(next(iter(sweep.values())).values())), key=float)
    rows = [
        [task, method, field, *(format(by_rate[r][field], form) for r in rates)]
        for task, methods in sweep.items()
        for method, by_rate in methods.items()
        for field, form in (("greedy", ".1%"), ("sampled", ".1%"), ("cross_entropy", ".3f"))
    ]
    return markdown_table(["task", "method", "", *(f"lr {r}" for r in rates)], rows)


def markdown(results: dict[str, Any]) -> str:
    """The report; every figure comes from `results`."""
    chosen = results["settings"]
    seeds = chosen["seeds"]
    parts = [
        "# The method's claims in miniature",
        f"A Llama of {chosen['layers']} layers, hidden size {chosen['hidden_size']}, pre-trained "
        f"here for {chosen['pretraining_steps']} steps on additions "
        f"({chosen['pretraining_wrong']:.0%} of them wrong, as in found text), sorting, "
        f"{corpus.OLD_FACTS} facts and sentences; then {chosen['steps']} tuning steps of "
        f"{chosen['batch']} rows from the same start, AdamW, fp32, learning rate {chosen['lr']:g} "
        f"(cosine to a tenth) for all methods alike; L2-SP λ {chosen['l2sp']:g}. "
        f"(a): {chosen['demonstrations']} demonstrations of additions, {chosen['wrong']:.0%} of "
        f"them with another pair's sum; tested on pairs that no training has seen. (b): "
        f"{chosen['facts']} random new facts; tested on these. Over {seeds} seeds of data and "
        "order: mean ± sample standard deviation.",
        "Made by `python examples/study/study.py"
        + (f" --sweep {' '.join(f'{lr:g}' for lr in chosen['sweep'])}" if chosen["sweep"] else "")
        + "`. Accuracy, greedy: the whole greedy answer is right. Accuracy, sampled: the "
        "probability that an answer drawn at temperature 1 is right, computed exactly (the paper's "
        "Avg@16 estimates it). Plain CE: nats a token of the right answers.",
        "![accuracy, drift and retention by method](RESULTS.png)",
    ]
    for task, methods in results["tables"].items():
        parts += [f"## {TITLES[task]}", _result_table(methods, task)]
    parts += ["## Does it agree with what is claimed?", claims.as_markdown(results["claims"])]
    rows = [
        [task, f"{d['mean_prob']:.3f}", f"{d['low']:.1%}", f"{d['low_sft_gradient'] or 0:.0%}",
         f"`--loss {d['loss']}`"]
        for task, d in results["diagnosis"].items()
    ]  # fmt: skip
    head = ["task", "mean p of the base", "tokens with p < 0.1", "their share of SFT's gradient",
            "recommends"]  # fmt: skip
    note = "Tokens of the demonstrations' answers, end tokens left out."
    parts += [
        "## What `megatron-dft diagnose` said before training",
        note,
        markdown_table(head, rows),
    ]
    if results["sweep"]:
        parts += ["## Learning rates (first seed)", _sweep_table(results["sweep"])]
    return "\n\n".join(parts) + "\n"


def write(out: Path, results: dict[str, Any]) -> None:
    """RESULTS.md, RESULTS.json and RESULTS.png in `out`."""
    for name, content in (
        ("RESULTS.png", picture.draw(results["tables"], TITLES)),
        ("RESULTS.json", json.dumps(results, indent=1, allow_nan=False).encode()),
        ("RESULTS.md", markdown(results).encode()),
    ):
        partial = out / (name + ".part")
        partial.write_bytes(content)
        partial.replace(out / name)
