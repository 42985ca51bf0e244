"""What post-training objectives do to one small model's weights and skills, side by side.

    pip install trl
    python examples/compare/compare.py --jobs 2 --out runs/compare

A small Llama is pre-trained on additions, sorting, facts and sentences until it adds half of the
time. From it SFT and DFT train on demonstrations, some of them wrong; RFT, offline DFT, RIFT and
DPO on its own samples, verified; GRPO (TRL's) and evolution strategies on the verifier's reward.
Each has a sweep of its own learning rate (σ for ES) on other problems than those that score, three
seeds, and a curve of models. Everything but GRPO goes through the product's commands. It may be
interrupted and run again: finished steps are kept. The report: OUT/RESULTS.md, .json and .png.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))

import answers
import corpus
import results
import rows
import start
from methods import METHODS, missing, snapshots
from sizes import Settings, parse, settings_of
from steps import Runner, StepFailed, Steps, run_process

HERE = Path(__file__).resolve().parent
LONGEST_ANSWER = 4  # [tokens] three digits and the end
# Of the samples: the data of a method → what `verify` is told.
KEPT: dict[str, list[Any]] = {
    "kept": ["--keep", "correct"],
    "judged": ["--keep", "all"],
    "pairs": ["--keep", "pairs", "--per-prompt", 1],
}


class Comparison:
    """The stages in order; `run_all` returns the report's numbers."""

    def __init__(
        self, settings: Settings, out: Path, jobs: int, run: Runner, say: Callable[[str], None]
    ) -> None:
        self.set, self.out, self.jobs, self.say = settings, out, jobs, say
        self.steps = Steps(out, run, say)
        self.base = out / "base"
        self.seeds = range(1, settings.seeds + 1)
        self.not_run = {name: why for name, m in METHODS.items() if (why := missing(m))}
        self.methods = [name for name in METHODS if name not in self.not_run]

    def run_all(self) -> dict[str, Any]:
        for name, why in self.not_run.items():
            self.say(f"{name} is left out: {why}")
        self._pretrain()
        for seed in self.seeds:
            self._make_rows(seed)
        swept = [
            (name, 1, rate)
            for name in self.methods
            if not METHODS[name].like
            for rate in METHODS[name].sweep[: self.set.rates]
        ]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self._tune(*run), swept))
            sweep = {name: self._sweep(name) for name in self.methods if not METHODS[name].like}
            chosen = {name: max(scores, key=scores.__getitem__) for name, scores in sweep.items()}
            self.chosen = {n: chosen[METHODS[n].like or n] for n in self.methods}
            rest = [(n, s, self.chosen[n]) for n in self.methods for s in self.seeds]
            list(pool.map(lambda run: self._tune(*run), rest))
            list(pool.map(self._measure, self.seeds))
        self._pages()
        return results.collect(self, sweep)

    def _data(self, name: str, seed: int) -> Path:
        return self.out / "data" / str(seed) / f"{name}.jsonl"

    def run_name(self, name: str, seed: int, rate: float) -> str:
        return f"{name}-{seed}-{rate:g}"

    def models(self, name: str, seed: int, rate: float) -> list[tuple[int, Path]]:
        method, out = METHODS[name], self.out / "tuned" / self.run_name(name, seed, rate)
        return snapshots(method, out, self._length(name), self.set.snapshots)

    def _length(self, name: str) -> int:
        lengths = {"train": self.set.steps, "grpo": self.set.grpo_steps, "es": self.set.iterations}
        return lengths[METHODS[name].trainer]

    def _pretrain(self) -> None:
        chosen, data, model = self.set, self.out / "data", self.out / "start"
        mixed = corpus.pretraining(chosen.pretraining_rows, wrong=0.1)
        corpus.write_jsonl(data / "pretraining.jsonl", mixed)
        texts = corpus.general_text(chosen.test_problems, "general text to test")
        corpus.write_jsonl(data / "general.jsonl", ({"text": text} for text in texts))
        corpus.write_jsonl(data / "test.jsonl", corpus.clean_sums(chosen.test_problems))
        start.write(model, chosen.hidden_size, chosen.layers)
        argv = self._training(
            model, data / "pretraining.jsonl", 128, chosen.pretraining_steps, 3e-3
        )
        argv += ["--loss", "sft", "--seed", 1, "--save-hf", self.base]
        inputs = [data / "pretraining.jsonl", model]
        self.steps("pretraining", "megatron_dft.train", argv, inputs, self.base)

    def _make_rows(self, seed: int) -> None:
        """A seed's problems, demonstrations of them, and the base's own answers, verified."""
        chosen, folder = self.set, self.out / "data" / str(seed)
        shown = corpus.noisy_sums(chosen.problems, chosen.wrong, seed)
        corpus.write_jsonl(self._data("demonstrations", seed), shown)
        problems = corpus.write_jsonl(self._data("problems", seed), rows.problems(shown))
        samples, settings = folder / "samples", folder / "samples" / "settings.json"
        argv = ["sample", "--model", self.base, "--prompts", problems, "--raw", "--samples"]
        argv += [
            chosen.samples,
            "--max-tokens",
            LONGEST_ANSWER,
            "--batch-size",
            512,
            "--seed",
            seed,
        ]
        argv += ["--device", "cpu", "--out", samples]
        self.steps(f"sample-{seed}", "megatron_dft.cli", argv, [self.base, problems], samples)
        needed = {METHODS[name].data for name in self.methods}
        for name, keep in KEPT.items():
            if name in needed:
                out = self._data(name, seed)
                argv = ["verify", samples, *self.set.verifier, "--workers", 1, "--out", out, *keep]
                inputs = [self.base, problems, settings]
                self.steps(f"{name}-{seed}", "megatron_dft.cli", argv, inputs, out)

    def _training(
        self, model: Path, data: Path, batch: int, steps: int, lr: float, pairs: bool = False
    ) -> list[Any]:
        # Rows have nearly one length: nothing to pack, but for the two answers of a pair. A packed
        # row is a micro-batch, and the model's positions hold two pairs.
        shape = ["--no-packing", "--seq-length", corpus.ROW_TOKENS]
        shape += ["--micro-batch-size", batch, "--global-batch-size", batch]
        if pairs:
            shape = ["--seq-length", 4 * corpus.ROW_TOKENS]
            shape += ["--micro-batch-size", 1, "--global-batch-size", batch // 2]
        return [
            "--device", "cpu", "--hf-model", model, "--train-data", data,
            "--data-cache", self.out / "cache", *shape,
            "--train-iters", steps,
            "--lr", lr, "--min-lr", lr / 10, "--lr-decay-style", "cosine",
            "--lr-warmup-iters", max(steps // 10, 1), "--weight-decay", 0.01, "--clip-grad", 1.0,
            "--log-interval", max(steps // 20, 1), "--progress", "off", "--overwrite",
        ]  # fmt: skip

    def _tune(self, name: str, seed: int, rate: float) -> None:
        method, chosen, length = METHODS[name], self.set, self._length(name)
        data, out = (
            self._data(method.data, seed),
            self.out / "tuned" / self.run_name(name, seed, rate),
        )
        every = length // chosen.snapshots
        online = [
            "--model",
            self.base,
            "--prompts",
            data,
            "--raw",
            *self.set.verifier,
            "--workers",
            1,
        ]
        online += ["--max-tokens", LONGEST_ANSWER, "--seed", seed, "--out", out]
        online += ["--save-interval", every]
        if method.trainer == "train":
            module = "megatron_dft.train"
            argv = self._training(self.base, data, chosen.batch, length, rate, method.pairs)
            argv += ["--loss", method.loss, "--seed", seed]
            argv += ["--save-hf", out, "--save-hf-interval", every]
        elif method.trainer == "grpo":
            module = str(HERE / "grpo.py")
            argv = [*online, "--steps", length, "--lr", rate, "--batch", chosen.batch]
        else:
            module, alpha = "megatron_dft.cli", rate / 2
            argv = ["es", *online, "--device", "cpu", "--batch-size", 512, "--iterations", length]
            argv += ["--population", chosen.population, "--sigma", rate, "--alpha", alpha]
            argv += ["--prompts-per-iteration", chosen.es_prompts]
            if name == "es+anchor":
                argv += ["--anchor-decay", f"{chosen.anchor / alpha:g}"]
        self.steps(self.run_name(name, seed, rate), module, argv, [data, self.base], out)

    def _sweep(self, name: str) -> dict[float, float]:
        """Rate → greedy accuracy on the validation problems of the first seed's last model."""
        held_out = rows.validation(self.set.test_problems)
        return {
            rate: answers.score(answers.load(self.models(name, 1, rate)[-1][1]), held_out)["greedy"]
            for rate in METHODS[name].sweep[: self.set.rates]
        }

    def _measure(self, seed: int) -> None:
        labels = {
            f"{name}@{step}": path
            for name in self.methods
            for step, path in self.models(name, seed, self.chosen[name])
        }
        data = self.out / "data"
        argv = ["--base", self.base, "--models", *(f"{k}={v}" for k, v in labels.items())]
        argv += ["--general", data / "general.jsonl", "--task", data / "test.jsonl"]
        argv += ["--problems", self.set.test_problems, "--out", self.measured(seed)]
        inputs = [self.base, *labels.values()]
        program = str(HERE / "measure.py")
        self.steps(f"measure-{seed}", program, argv, inputs, self.measured(seed))

    def measured(self, seed: int) -> Path:
        return self.out / f"measured-{seed}.json"

    def _pages(self) -> None:
        """The pages of `drift` and `retention` for the first seed's last models, side by side."""
        last = {n: self.models(n, 1, self.chosen[n])[-1][1] for n in self.methods}
        data, page = self.out / "data", self.out / "page"
        texts = ["--text", data / "general.jsonl", "--task", data / "test.jsonl"]
        more = {
            "drift": ["--workers", 1, "--principal-k", 1, 8],
            "retention": [*texts, "--task-samples", self.set.test_problems],
        }
        for command, options in more.items():
            argv = [command, self.base, *last.values(), "--labels", *last, *options, "--out", page]
            inputs, out = [self.base, *last.values()], page / f"{command}.json"
            self.steps(command, "megatron_dft.cli", argv, inputs, out)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main(argv: Sequence[str] | None = None, run: Runner = run_process) -> int:
    args = parse((__doc__ or "").splitlines()[0], argv)
    try:
        settings = settings_of(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // args.jobs, 1)))
    began = time.monotonic()
    try:
        found = Comparison(settings, args.out, args.jobs, run, say).run_all()
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results.write(args.out, found)
    say(f"{args.out / 'RESULTS.md'}: {time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
