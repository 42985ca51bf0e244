"""Runs that several tests of a file compare: each is made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.train.launch import flags, run_train, weights

Trained = tuple[list[dict[str, float]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def train_once(tmp_path_factory, tiny_model, chats) -> Callable[..., Trained]:
    """train_once(world_size, model=tiny_model, **flags) → figures of each step, exported weights.

    A run is made when it is first asked for, and once a module.
    """
    directory: Path = tmp_path_factory.mktemp("runs")
    made: dict[str, Trained] = {}

    def train(world_size: int, model: Path = tiny_model, **given: Any) -> Trained:
        key = repr((world_size, model, sorted(given.items())))
        if key not in made:
            out = directory / str(len(made))
            argv = flags(model, chats, save_hf=out, **given)
            made[key] = run_train(world_size, *argv), weights(out)
        return made[key]

    return train
