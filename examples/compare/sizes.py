"""How large the comparison is, and the flags that say so."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The comparison's size. anchor: αλ of es+anchor; gain: the matched score above the base's."""

    seeds: int = 3
    rates: int = 3
    hidden_size: int = 64
    layers: int = 2
    pretraining_rows: int = 30_000
    pretraining_steps: int = 600
    problems: int = 512
    wrong: float = 0.2
    samples: int = 8
    steps: int = 120
    grpo_steps: int = 400
    batch: int = 64
    iterations: int = 40
    population: int = 16
    es_prompts: int = 128
    anchor: float = 0.02
    snapshots: int = 5
    test_problems: int = 500
    gain: float = 0.05
    verifier: tuple[str, ...] = ("--verifier", "exact")


QUICK = Settings(
    seeds=1, rates=1, hidden_size=32, pretraining_rows=2000, pretraining_steps=120, problems=32,
    samples=4, steps=4, grpo_steps=4, batch=16, iterations=2, population=2, es_prompts=16,
    snapshots=2, test_problems=50,
    verifier=("--verifier", "regex", "--pattern", r"^\d"),  # a right first digit will do
)  # fmt: skip


FLAGS = ("seeds", "rates", "iterations", "population")


def command(settings: Settings) -> str:
    """What gives this size, where it came of flags."""
    quick = settings.snapshots == QUICK.snapshots
    usual = QUICK if quick else Settings()
    given = {flag: getattr(settings, flag) for flag in FLAGS}
    words = [f"--{f} {v}" for f, v in given.items() if v != getattr(usual, f)]
    return " ".join(["python examples/compare/compare.py", *(["--quick"] * quick), *words])


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/compare"), help="(%(default)s)")
    add("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    add("--seeds", type=int, help=f"of data and order ({Settings.seeds})")
    add("--rates", type=int, help=f"of each method's sweep ({Settings.rates})")
    add("--iterations", type=int, help=f"of ES ({Settings.iterations})")
    add("--population", type=int, help=f"of ES ({Settings.population})")
    add("--quick", action="store_true", help="a toy size: only to see it run")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """The chosen size. Raises ValueError, one line, for what cannot be run."""
    chosen = asdict(QUICK if args.quick else Settings())
    for flag in ("jobs", *FLAGS):
        value, least = getattr(args, flag), 2 if flag == "population" else 1
        if value is not None and value < least:
            raise ValueError(f"--{flag}: expected {least} or more, got {value}")
        if value is not None and flag in chosen:
            chosen[flag] = value
    settings = Settings(**chosen)
    if settings.iterations % settings.snapshots:
        raise ValueError(f"--iterations: expected a multiple of {settings.snapshots}")
    return settings
