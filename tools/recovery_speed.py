"""Processor time of saving, resuming and data start-up, in this checkout beside another one.

    python tools/recovery_speed.py --before TREE --repeats 15 -- --hf-model DIR --train-data FILE …

What follows `--` are flags of megatron_dft.train that both know, without --train-iters, --save,
--load and --data-cache. A process for each tree imports Megatron once and forks the runs, which
take turns; in each turn a run starts from nothing and saves every step, and a run goes on from its
last one. Prints medians over the turns, and the median of the ratios of a turn.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 6
Spent = dict[str, list[list[float]]]  # what was done → [processor, wall] seconds, each time


def _clocks() -> tuple[float, float]:
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    return cpu, time.perf_counter()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    now = _clocks()
    return now[0] - start[0], now[1] - start[1]


def _timed(function: Callable[..., Any], spent: list[list[float]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = _clocks()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(_since(start))

    return call


def _import_all() -> None:
    """Every module of a run: reading its source is no part of what is measured."""
    from transformers import AutoTokenizer  # noqa: F401

    from megatron_dft import recovery, training
    from megatron_dft.cpu import runtime

    runtime.activate()  # before what takes names from Megatron
    for room in (recovery, training):
        for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            importlib.import_module(found.name)


def _train(words: list[str]) -> Spent:
    """One run in this process; every place is timed outside of all that the tree puts around it."""
    import megatron.training as package
    from megatron.training import training

    _import_all()
    from megatron_dft import train

    spent: Spent = {"data": [], "save": [], "load": [], "start": []}
    plain_pretrain, plain_prepare = package.pretrain, train._prepare

    def pretrain(*args: Any, **kwargs: Any) -> Any:
        for name, place in (("save_checkpoint_and_time", "save"), ("load_checkpoint", "load")):
            setattr(training, name, _timed(getattr(training, name), spent[place]))
        plain_step = training.train_step

        def first_step(*args: Any, **kwargs: Any) -> Any:
            if not spent["start"]:
                spent["start"].append(_since(start))
            return plain_step(*args, **kwargs)

        training.train_step = first_step
        return plain_pretrain(*args, **kwargs)

    package.pretrain = pretrain
    train._prepare = _timed(plain_prepare, spent["data"])
    start = _clocks()
    with contextlib.suppress(SystemExit):  # Megatron's way out at --exit-interval
        if train.main(words):
            raise RuntimeError("the run was refused")
    return spent


def _forked(words: list[str]) -> Spent:
    import torch

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        torch.set_num_threads(1)
        content = json.dumps(_train(words)).encode()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(content)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content)


def serve(tree: str) -> None:
    """Runs each line of standard input, a JSON list of words, and answers with its times."""
    sys.path.insert(0, tree)
    os.environ.update(TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")
    import megatron.training.training  # noqa: F401
    import transformers  # noqa: F401

    gc.freeze()  # a collection of what was imported falls into whichever part is on

    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


class Tree:
    """A checkout whose runs are measured; their output goes to `log`."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        # Compiled in the warm-up, as an installed package is; none of it is left in the trees.
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        kept["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
        with (directory / "log").open("w") as log:
            self._server = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(path.resolve())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=kept,
            )  # fmt: skip

    def run(self, words: list[str]) -> Spent:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(words), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit(f"a run failed: {(self.directory / 'log').read_text()[-4000:]}")
        return json.loads(answer)

    def turn(self, words: list[str]) -> Spent:
        """A run from nothing that saves, one that resumes; what each part took, a time each."""
        save, cache = self.directory / "save", self.directory / "cache"
        for old in (save, cache):
            shutil.rmtree(old, ignore_errors=True)
        words = [*words, "--data-cache", str(cache), "--train-iters", str(STEPS + 1)]
        saving = ["--save", str(save), "--save-interval", "1", "--exit-interval", str(STEPS)]
        first = self.run([*words, *saving])
        again = [*words, "--load", str(save)]
        resumed = self.run(again)
        shutil.rmtree(cache / "tokens" / "verified", ignore_errors=True)
        hashed = self.run(again)  # as on a node that has not seen the cache
        return {
            "a save": first["save"],
            "data start-up, nothing cached": first["data"],
            "data start-up, cached": resumed["data"],
            "data start-up, cached, hashed": hashed["data"],
            "loading": resumed["load"],
            "resuming, to the first step": resumed["start"],
        }


def report(before: list[Spent], after: list[Spent]) -> None:
    print("| processor time (wall) | before | here | here / before, median of turns |")
    print("|---|---|---|---|")
    for name in before[0]:
        cells, means = [], []
        for turns in (before, after):
            cpu, wall = (
                [statistics.median(once[clock] for once in turn[name]) for turn in turns]
                for clock in (0, 1)
            )
            means.append(cpu)
            middles = statistics.median(cpu), statistics.median(wall)
            cells.append("{:.1f} ms ({:.1f})".format(*(1000 * one for one in middles)))
        ratios = [b / a for a, b in zip(*means, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {cells[0]} | {cells[1]} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each tree")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("train", nargs="*", help="flags of megatron_dft.train, after --")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    with tempfile.TemporaryDirectory() as directory:
        here = Path(__file__).parents[1]
        trees = [Tree(args.before, Path(directory, "before")), Tree(here, Path(directory, "here"))]
        turns: list[list[Spent]] = [[], []]
        for repeat in range(args.repeats + 1):
            for which in (0, 1) if repeat % 2 else (1, 0):
                spent = trees[which].turn(args.train)
                if repeat:  # the first one warms up
                    turns[which].append(spent)
        report(*turns)


if __name__ == "__main__":
    main()
