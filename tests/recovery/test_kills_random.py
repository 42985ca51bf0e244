"""kill -9 at random moments of training, export and scoring, and pairs of writers: nothing that was
committed is lost, nothing that looks whole is not, and of two writers one is refused.

Slow: 60 kills of training, 30 of export and scoring, 20 pairs; `KILLS=0.1` runs a tenth of them.
The figures are printed (pytest -s).
"""

import argparse
import functools
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_dft.hf.source import open_checkpoint
from megatron_dft.recovery import manifest
from megatron_dft.storage import lock
from tests.hf.test_round_trip import assert_same_bytes
from tests.ranks import run_ranks
from tests.recovery.runs import assert_same_tensors, run
from tests.train.launch import flags

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SCALE = float(os.environ.get("KILLS", "1"))
STEPS = 30


def count(whole: int) -> int:
    return max(1, round(whole * SCALE))


def _die(seconds, victim):
    if os.environ["RANK"] != str(victim):
        return

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def killed(world_size, words, status, seconds, victim):
    """A run that one rank of is killed after so many seconds; what it came to, None for a death."""
    try:
        return run(
            world_size, *words, status=status, before=functools.partial(_die, seconds, victim)
        )
    except Exception:  # the death, or what it does to the other rank first
        return None


def committed(root: Path) -> list[int]:
    return [
        step
        for step in manifest.iterations(root)
        if (manifest.iteration_directory(root, step) / manifest.FILE_NAME).exists()
    ]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_training(tensor_parallel, tiny_model, chats, tmp_path):
    draw = random.Random(tensor_parallel)

    def words(directory):
        where = dict(save=directory, load=directory, save_interval=2)
        return flags(tiny_model, chats, loss="dft", train_iters=STEPS,
                     tensor_model_parallel_size=tensor_parallel, **where)  # fmt: skip

    status = tmp_path / "status"
    whole = run(tensor_parallel, *words(tmp_path / "whole"), status=status)
    # The first one waited for the fork server's imports.
    started = time.monotonic()
    run(tensor_parallel, *words(tmp_path / "again"), status=status)
    duration = time.monotonic() - started
    last = f"iter_{STEPS:07d}"
    kills, rounds, resumed, here = 0, 0, 0, tmp_path / "0"
    while kills < count(30):
        before, started = committed(here), time.monotonic()
        ended = killed(
            tensor_parallel, words(here), status,
            draw.uniform(0.2, 1.0) * duration, draw.randrange(tensor_parallel),
        )  # fmt: skip
        assert set(before) <= set(committed(here)), "a committed step is lost"
        if ended is None:
            kills += 1
            resumed += bool(before)
            continue
        assert ended.word == "finished" and ended.steps == whole.steps[STEPS - len(ended.steps) :]
        assert_same_tensors(tmp_path / "whole" / last, here / last)
        shutil.rmtree(here)
        if not before:
            duration = time.monotonic() - started
        rounds += 1
        here = tmp_path / str(rounds)
    ended = run(tensor_parallel, *words(here), status=status)
    assert ended.word == "finished"
    assert_same_tensors(tmp_path / "whole" / last, here / last)
    print(f"\ntraining, TP {tensor_parallel}: {kills} kills, {resumed} of them of resumed runs, "
          f"{rounds + 1} runs came to their end, bit-equal; 0 bad")  # fmt: skip


def _command(name, words, seconds):
    import importlib

    os.environ["RANK"] = "0"
    if seconds is not None:
        _die(seconds, 0)
    module = importlib.import_module(f"megatron_dft.commands.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args([str(word) for word in words]))
    except ValueError as error:
        return str(error)


def command(name, *words, seconds=None):
    """The command's status, or its one line; None where it was killed."""
    try:
        return run_ranks(_command, 1, name, words, seconds, init=False)[0]
    except TimeoutError:
        return None


def test_export(tiny_model, tmp_path):
    draw, model = random.Random(3), tmp_path / "torch_dist"
    assert command("import_hf", tiny_model, model) == 0
    out, words = tmp_path / "out/hf", (model, tmp_path / "out/hf", "--hf-model", tiny_model)
    started = time.monotonic()
    assert command("export_hf", *words) == 0
    duration = time.monotonic() - started
    shutil.rmtree(out.parent)
    kills = replaced = 0
    while kills < count(15):
        there = out.exists()
        ended = command("export_hf", *words, "--overwrite", seconds=draw.uniform(0, duration))
        kills += ended is None
        assert ended in (None, 0)
        assert not there or out.exists(), "an export is gone"
        if out.exists():
            open_checkpoint(out)
            assert_same_bytes(out, tiny_model)
            replaced += there
    assert command("export_hf", *words, "--overwrite") == 0
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    print(f"\nexport: {kills} kills, {replaced} over an export that was there; 0 bad")


def _score(words, seconds):
    from megatron_dft import score

    if seconds is not None:
        _die(seconds, 0)
    return score.main(words)


def scored(words, seconds=None):
    try:
        return run_ranks(_score, 1, words, seconds, init=False)[0]
    except TimeoutError:
        return None


def test_score(tiny_model, chats, tmp_path):
    draw = random.Random(4)

    def words(directory):
        return flags(tiny_model, chats, dft_reference_scores=directory, score_segment_tokens=64)

    started = time.monotonic()
    assert scored(words(tmp_path / "whole")) == 0
    duration = time.monotonic() - started
    kills, rounds, here = 0, 0, tmp_path / "0"
    while kills < count(15):
        ended = scored(words(here), draw.uniform(0, 1.1 * duration))
        kills += ended is None
        if (here / "scores.json").exists():
            same(here, tmp_path / "whole")
            rounds += 1
            here = tmp_path / str(rounds)
    assert scored(words(here)) == 0
    same(here, tmp_path / "whole")
    print(f"\nscore: {kills} kills, {rounds + 1} directories came to their end, bit-equal; 0 bad")


def same(one: Path, other: Path) -> None:
    assert (one / "scores.f32").read_bytes() == (other / "scores.f32").read_bytes()


def pair(first, second):
    """What two that begin together come to."""
    with ThreadPoolExecutor(2) as pool:
        return [f.result() for f in [pool.submit(first), pool.submit(second)]]


def test_pairs_of_training(tiny_model, chats, tmp_path):
    """One trains, the other is refused; where it came after the end, it finds all done."""
    refused = after = 0
    for number in range(count(10)):
        save = tmp_path / f"{number}"
        words = flags(tiny_model, chats, loss="dft", train_iters=4, save=save, load=save,
                      save_interval=1)  # fmt: skip
        ended = pair(
            *(functools.partial(run, 1, *words, status=tmp_path / f"s{i}") for i in range(2))
        )
        finished = [e for e in ended if e.word == "finished"]
        others = [e for e in ended if e.word == "refused"]
        assert finished and len(finished) + len(others) == 2
        for one in others:
            assert one.codes == [2] and not one.rows and "is being written by" in one.texts[0]
        refused, after = refused + len(others), after + len(finished) - 1
        assert len([1 for e in finished if e.rows]) == 1, "both trained"
        assert committed(save) == [1, 2, 3, 4] and not (save / lock.NAME).exists()
        for step in committed(save):
            directory = manifest.iteration_directory(save, step)
            assert not manifest.problems(directory, manifest.read(directory), 0, 1)
            assert not manifest.unaccounted(directory, manifest.read(directory)["files"])
    print(f"\npairs of training: {refused} refused, {after} came after the end; 0 bad")


def test_pairs_of_export_and_score(tiny_model, chats, tmp_path):
    model = tmp_path / "torch_dist"
    assert command("import_hf", tiny_model, model) == 0
    refused = after = 0
    for number in range(count(5)):
        out = tmp_path / f"out{number}/hf"
        export = functools.partial(
            command, "export_hf", model, out, "--hf-model", tiny_model, "--overwrite"
        )
        ended = pair(export, export)
        lines = [e for e in ended if e != 0]
        assert len(lines) < 2 and all("is being written by" in line for line in lines)
        assert_same_bytes(out, tiny_model)
        assert [path.name for path in out.parent.iterdir()] == ["hf"]
        refused, after = refused + len(lines), after + 1 - len(lines)
    for number in range(count(5)):
        words = flags(tiny_model, chats, dft_reference_scores=tmp_path / f"scores{number}",
                      score_segment_tokens=64)  # fmt: skip
        ended = pair(functools.partial(scored, words), functools.partial(scored, words))
        assert sorted(ended) in ([0, 0], [0, 2])
        refused, after = refused + (2 in ended), after + (2 not in ended)
        same(tmp_path / f"scores{number}", tmp_path / "scores0")
    print(f"\npairs of export and score: {refused} refused, {after} came after the end; 0 bad")
