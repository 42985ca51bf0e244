"""The method's claims in miniature, on a CPU: five ways to tune one small model, on two tasks.

    python examples/study/study.py                  # about 25 minutes on one core
    python examples/study/study.py --jobs 2 --seeds 3 --out runs/study

A small Llama is pre-trained on additions, sorting, facts and sentences. From it SFT, DFT, dft-mix,
asft and SFT with the L2-SP anchor are tuned on (a) additions, which it masters, with wrong sums
among the demonstrations, and (b) facts that it cannot know. Everything goes through the product's
commands: megatron_dft.train, megatron-dft export, diagnose, drift and retention. It may be
interrupted and run again: finished steps are kept. The report: OUT/RESULTS.md, .json and .png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import report
import start
from steps import Runner, StepFailed, Steps, run_process

METHODS: dict[str, list[str]] = {
    "sft": ["--loss", "sft"],
    "dft": ["--loss", "dft"],
    "dft-mix": ["--loss", "dft-mix"],
    "asft": ["--loss", "asft"],
    "sft+l2sp": ["--loss", "sft", "--l2sp-coeff", "{l2sp}"],
}
TASKS = ("sums", "facts")
SWEPT = ("sft", "dft", "asft")


@dataclass(frozen=True)
class Settings:
    """The study's size. Steps are optimizer steps of `batch` rows; probabilities are shares."""

    seeds: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    lr: float = 3e-4
    sweep: tuple[float, ...] = ()
    l2sp: float = 30.0
    hidden_size: int = 128
    layers: int = 3
    pretraining_rows: int = 40_000
    pretraining_wrong: float = 0.1
    pretraining_steps: int = 700
    pretraining_batch: int = 128
    steps: int = 160
    batch: int = 64
    demonstrations: int = 1024
    wrong: float = 0.4
    facts: int = 96
    test_problems: int = 1000


QUICK = Settings(
    seeds=1, methods=("sft", "dft"), hidden_size=32, layers=2, pretraining_rows=256,
    pretraining_steps=6, pretraining_batch=32, steps=4, batch=16, demonstrations=64, facts=16,
    test_problems=50,
)  # fmt: skip


def name_of(task: str, method: str, seed: int, lr: float | None = None) -> str:
    return f"{task}-{method}-{seed}" + (f"-lr{lr:g}" if lr is not None else "")


class Study:
    """The stages in order; `run_all` returns the report's numbers."""

    def __init__(
        self, settings: Settings, out: Path, jobs: int, run: Runner, say: Callable[[str], None]
    ) -> None:
        self.set, self.out, self.jobs = settings, out, jobs
        self.steps = Steps(out, run, say)
        self.base = out / "base"
        self.seeds = range(1, settings.seeds + 1)

    def run_all(self) -> dict[str, Any]:
        self._write_data()
        self._pretrain()
        for task in TASKS:
            data = self._data(task, 1)
            out = self.out / "diagnosis" / task
            argv = ["diagnose", self.base, data, "--out", out]
            self.steps(f"diagnose-{task}", "megatron_dft.cli", argv, [data, self.base], out)
        runs = [(t, m, s, None) for t in TASKS for m in self.set.methods for s in self.seeds]
        swept = [m for m in SWEPT if m in self.set.methods]
        runs += [(t, m, 1, lr) for t in TASKS for m in swept for lr in self.set.sweep]
        with ThreadPoolExecutor(self.jobs) as pool:
            # list: an exception of any run ends the study here.
            list(pool.map(lambda run: self._tune(*run), runs))
            cells = [(task, seed) for task in TASKS for seed in self.seeds]
            list(pool.map(lambda cell: self._lens(*cell), cells))
        return report.collect(self.out, self.base, self.set, TASKS, swept, name_of)

    def _data(self, task: str, seed: int) -> Path:
        return self.out / "data" / f"{task}-{seed}.jsonl"

    def _write_data(self) -> None:
        chosen, data = self.set, self.out / "data"
        rows = corpus.pretraining(chosen.pretraining_rows, chosen.pretraining_wrong)
        corpus.write_jsonl(data / "pretraining.jsonl", rows)
        texts = corpus.general_text(chosen.test_problems, "general text to test")
        corpus.write_jsonl(data / "general.jsonl", ({"text": text} for text in texts))
        corpus.write_jsonl(data / "sums-test.jsonl", corpus.clean_sums(chosen.test_problems))
        for seed in self.seeds:
            sums = corpus.noisy_sums(chosen.demonstrations, chosen.wrong, seed)
            corpus.write_jsonl(self._data("sums", seed), sums)
            corpus.write_jsonl(self._data("facts", seed), corpus.new_facts(chosen.facts, seed))
        start.write(self.out / "start", chosen.hidden_size, chosen.layers)

    def _training(self, model: Path, data: Path, batch: int, steps: int, lr: float) -> list[Any]:
        # Rows have nearly one length and a small batch of them is one step: nothing to pack.
        return [
            "--device", "cpu", "--hf-model", model, "--train-data", data,
            "--data-cache", self.out / "cache", "--no-packing", "--seq-length", corpus.ROW_TOKENS,
            "--micro-batch-size", batch, "--global-batch-size", batch, "--train-iters", steps,
            "--lr", lr, "--min-lr", lr / 10, "--lr-decay-style", "cosine",
            "--lr-warmup-iters", max(steps // 10, 1), "--weight-decay", 0.01, "--clip-grad", 1.0,
            "--log-interval", max(steps // 20, 1), "--progress", "off",
        ]  # fmt: skip

    def _pretrain(self) -> None:
        chosen, data = self.set, self.out / "data" / "pretraining.jsonl"
        checkpoint, model = self.out / "checkpoint", self.out / "start"
        argv = self._training(model, data, chosen.pretraining_batch, chosen.pretraining_steps, 2e-3)
        argv += ["--loss", "sft", "--seed", 1]
        argv += ["--save", checkpoint, "--save-interval", chosen.pretraining_steps]
        self.steps("pretraining", "megatron_dft.train", argv, [data, model], checkpoint)
        argv = ["export", checkpoint, self.base, "--hf-model", model]
        # What the checkpoint was made of stands for its many files.
        made_of = [data, model, self.out / "logs" / "pretraining.done"]
        self.steps("export", "megatron_dft.cli", argv, made_of, self.base)

    def _tune(self, task: str, method: str, seed: int, lr: float | None) -> None:
        chosen, data = self.set, self._data(task, seed)
        name = name_of(task, method, seed, lr)
        argv = self._training(
            self.base, data, chosen.batch, chosen.steps, chosen.lr if lr is None else lr
        )
        argv += [word.format(l2sp=chosen.l2sp) for word in METHODS[method]]
        out = self.out / "tuned" / name
        argv += ["--seed", seed, "--save-hf", out]
        self.steps(name, "megatron_dft.train", argv, [data, self.base], out)

    def _lens(self, task: str, seed: int) -> None:
        """Drift and retention of all methods of one task and seed, on one page."""
        names = [name_of(task, method, seed) for method in self.set.methods]
        tuned = [self.out / "tuned" / name for name in names]
        data, lens = self.out / "data", self.out / "lens" / f"{task}-{seed}"
        held_out = data / "sums-test.jsonl" if task == "sums" else self._data(task, seed)
        texts = ["--text", data / "general.jsonl", "--task", held_out]
        for command, options in (("drift", ["--workers", 1]), ("retention", texts)):
            argv = [command, self.base, *tuned, "--labels", *self.set.methods, *options]
            inputs = [self.base, *tuned, held_out]
            name, out = f"{command}-{task}-{seed}", lens / f"{command}.json"
            self.steps(name, "megatron_dft.cli", [*argv, "--out", lens], inputs, out)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="tuning runs at a time (%(default)s)")
    parser.add_argument("--seeds", type=int, help=f"of data and order ({Settings.seeds})")
    parser.add_argument(
        "--lr", type=float, help=f"of tuning, the same for all methods ({Settings.lr:g})"
    )
    parser.add_argument(
        "--sweep", type=float, nargs="+", default=[], metavar="LR",
        help="also tune by SFT, DFT and asft, first seed, at these learning rates",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a toy size: only to see it run")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """The chosen size. Raises ValueError, one line, for what cannot be run."""
    for flag in ("jobs", "seeds"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag}: expected 1 or more, got {value}")
    for rate in [*args.sweep, *([args.lr] if args.lr is not None else [])]:
        if not 0 <= rate < 1:
            raise ValueError(f"--lr, --sweep: expected rates from 0 to below 1, got {rate}")
    chosen = asdict(QUICK if args.quick else Settings())
    chosen.update({n: v for n in ("seeds", "lr") if (v := getattr(args, n)) is not None})
    return Settings(**{**chosen, "sweep": tuple(args.sweep)})


def main(argv: Sequence[str] | None = None, run: Runner = run_process) -> int:
    args = _parse(argv)
    try:
        settings = settings_of(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    began = time.monotonic()
    try:
        results = Study(settings, args.out, args.jobs, run, say).run_all()
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results["settings"] = json.loads(json.dumps(asdict(settings)))
    report.write(args.out, results)
    say(f"{args.out / 'RESULTS.md'}: {time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
