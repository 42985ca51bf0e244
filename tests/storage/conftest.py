"""A checkpoint that training wrote."""

import pytest

from tests.train.launch import flags, run_train


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model, chats):
    """What --save holds after one step on two tensor-parallel ranks."""
    out = tmp_path_factory.mktemp("trained") / "save"
    words = flags(tiny_model, chats, train_iters=1, save=out, save_interval=1)
    run_train(2, *words, "--tensor-model-parallel-size", "2")
    return out
