"""Run `megatron_dft.train` on N gloo ranks of the fork server, and hear every figure."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.ranks import run_ranks
from tests.train import listener


def _rank(argv: list[str], before: Callable[[], None] | None) -> tuple[int, list[dict[str, float]]]:
    from megatron_dft import train

    heard: list[dict[str, float]] = []
    listener.on_figures(heard.append)
    if before is not None:
        before()
    return train.main(argv), [{k: v for k, v in one.items() if k != "step"} for one in heard]


def run_train(
    world_size: int,
    *argv: str,
    before: Callable[[], None] | None = None,
    timeout: float = 300,
) -> list[dict[str, float]]:
    """Train on `world_size` ranks; the figures of each step, of the last rank. Exit status 0.

    `before`, a module-level function, runs on each rank first: to break or replace a part.
    """
    results = run_ranks(_rank, world_size, list(argv), before, init=False, timeout=timeout)
    assert [code for code, _ in results] == [0] * world_size
    return results[-1][1]


def flags(model: Path, data: Path, **given: Any) -> list[str]:
    """Command line of a short run on a tiny model; `given` overrides, None drops, True is bare."""
    values: dict[str, Any] = {
        "hf_model": model,
        "train_data": data,
        "seq_length": 64,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 5,
        "lr": 1e-3,
        "min_lr": 1e-3,
        "lr_decay_style": "constant",
        "clip_grad": 1.0,
        "weight_decay": 0.01,
        "make_vocab_size_divisible_by": 8,
        "no_packing": True,
        **given,
    }
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return words


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of an exported checkpoint; each pipeline stage wrote files of its own."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def largest_relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst tensor's ‖got − expected‖ / ‖expected‖; the names must be the same."""
    assert got.keys() == expected.keys()
    return max(
        float((got[name] - expected[name]).norm() / expected[name].norm()) for name in expected
    )


def assert_same_training(
    got: tuple[list[dict[str, float]], dict[str, Tensor]],
    expected: tuple[list[dict[str, float]], dict[str, Tensor]],
    names: Sequence[str] | None = None,
    weights_within: float = 1e-5,
) -> None:
    """The same figures, in each step equal to 1e-5 (`names`; None: all of them), equal weights."""
    (ours, trained), (theirs, trained_once) = got, expected
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for name in names or mine:
            assert mine[name] == pytest.approx(other[name], abs=1e-5), (step, name)
    assert largest_relative_error(trained, trained_once) <= weights_within


def scalars(directory: Path) -> dict[str, float]:
    """TensorBoard's last value of each tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def slow_events() -> None:
    """For `before`: TensorBoard's writing thread is behind by 20 figures when training ends."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def slowly(self, data: bytes) -> None:
        time.sleep(0.02)
        write(self, data)

    RecordWriter.write = slowly  # type: ignore[method-assign]


def tolerate_exit() -> None:
    """For `before`: --exit-interval ends the process by sys.exit, which is status 0 here."""
    from megatron_dft import train

    main = train.main

    def exit_is_status(argv: list[str]) -> int:
        try:
            return main(argv)
        except SystemExit as exit:
            return int(exit.code or 0)

    train.main = exit_is_status  # type: ignore[assignment]
