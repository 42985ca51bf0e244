"""What tools/benchmark_loss.py prints and writes: medians, ratios, achieved rates, CSV and PNG."""

import csv
import statistics
from pathlib import Path

import benchmark_loss_methods as methods

CASE = ("vocab", "hidden", "tokens", "supervised", "tp")


def summary(name: str, case: dict, size: int, runs: list[dict], others: dict) -> dict:
    """Medians, spread, ratios and achieved rates of one method's repetitions.

    `others`: repetitions of the methods that ratios are taken to, by name.
    """
    row = {key: case[key] for key in CASE[:-1]} | {"tp": size, "method": name}
    for key in ("s", "cpu-s", "MiB"):
        row[key] = statistics.median(r[key] for r in runs)
    row["s-min"], row["s-max"] = min(r["s"] for r in runs), max(r["s"] for r in runs)
    for label, other in others.items():
        for key in ("s", "cpu-s", "MiB"):
            # Megatron's cross entropy of fp32 logits works in their place: no memory to share.
            ratios = [
                r[key] / b[key] if key != "MiB" or b[key] > 1 else float("nan")
                for r, b in zip(runs, other, strict=False)
            ]
            row[f"{key} / {label}"] = statistics.median(ratios) if ratios else float("nan")
    supervised = case["tokens"] * case["supervised"]
    logits = supervised * case["rows"]
    row["TFLOPS"] = 6e-12 * logits * case["hidden"] / row["s"] if case["hidden"] else 0.0
    # What a logit needs: 6 bytes in bf16 from logits (read, read, write), 12 from hidden states.
    needed = (3 if not case["hidden"] else 6) * case["itemsize"]
    row["TB/s"] = 1e-12 * needed * logits / row["s"]
    row |= {key: runs[0][key] for key in ("collectives", "comm-MiB", "loss")}
    row["gradient"] = max((r["gradient"] for r in runs if "gradient" in r), default=0.0)
    return row


def print_row(row: dict, milliseconds: bool) -> None:
    factor, unit = (1e3, "ms") if milliseconds else (1.0, "s")
    ratios = "  ".join(
        f"×{row[key]:.2f} {key.removeprefix('s / ')}" for key in row if key.startswith("s / ")
    )
    size = f"h={row['hidden']:<5} " if row["hidden"] else ""
    print(
        f"V={row['vocab']:<7} {size}T={row['tokens']:<5} {row['supervised']:>4.0%} tp={row['tp']} "
        f"{row['method']:<25} {factor * row['s']:8.2f} {unit} "
        f"[{factor * row['s-min']:.2f}–{factor * row['s-max']:.2f}] {ratios}  "
        f"cpu {row['cpu-s']:6.2f} s  {row['MiB']:7.0f} MiB  {row['TB/s']:5.2f} TB/s "
        f"{row['TFLOPS']:4.0f} TFLOPS  {row['collectives']:3} collectives "
        f"{row['comm-MiB']:7.2f} MiB  loss {row['loss']:.6f}  "
        f"gradient within {row['gradient']:.1e}",
        flush=True,
    )


def linear_fits(rows: list[dict]) -> None:
    """R² of cpu seconds = a + b · supervised tokens · V/tp, where there are 4 sizes or more."""
    import numpy as np

    for name in sorted({r["method"] for r in rows}):
        for tp in sorted({r["tp"] for r in rows}):
            own = [r for r in rows if r["method"] == name and r["tp"] == tp]
            x = np.array([r["tokens"] * r["supervised"] * r["vocab"] / tp for r in own])
            y = np.array([r["cpu-s"] for r in own])
            if len(set(x)) >= 4 and len({r["hidden"] for r in own}) == 1:
                slope, intercept = np.polyfit(x, y, 1)
                residual = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
                print(
                    f"{name:<25} tp={tp}: {intercept:.2f} s + {slope * 1e9:.2f} ns a supervised "
                    f"token and vocabulary row, R² {1 - residual:.4f}"
                )


def write(rows: list[dict], directory: Path, name: str) -> None:
    """DIRECTORY/NAME.csv and DIRECTORY/NAME.png."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, directory / f"{name}.png")


def _plot(rows: list[dict], path: Path) -> None:
    """Time and memory of each method as shares of the baseline's, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(tuple(r[key] for key in CASE) for r in rows))
    names = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(8, 1.6 * len(cases)), 8), sharex=True)
    keys = (f"s / {methods.BASELINE}", f"MiB / {methods.BASELINE}")
    for axis, key in zip(axes, keys, strict=True):
        for i, name in enumerate(names):
            own = {tuple(r[k] for k in CASE): r.get(key, 0) for r in rows if r["method"] == name}
            places = [j + 0.8 * i / len(names) for j in range(len(cases))]
            axis.bar(places, [own.get(c, 0) for c in cases], 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_ylabel(key)
    axes[0].legend(fontsize=7)
    axes[1].set_xticks(
        range(len(cases)),
        [f"V {v}\nh {h}\nT {t}\n{s:.0%} tp{p}" for v, h, t, s, p in cases],
        fontsize=7,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
