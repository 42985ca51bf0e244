"""When a run evaluates, and on how much, where nobody says so."""

from types import SimpleNamespace

import pytest

from megatron_dft.flags import evaluation


def _args(**given):
    values = dict(valid_data=["v"], valid_share=0.0, train_iters=400, train_samples=None,
                  train_epochs=None, global_batch_size=8, eval_interval=1000)  # fmt: skip
    return SimpleNamespace(**values | given)


@pytest.mark.parametrize(
    ("args", "given", "steps"),
    [
        ({}, {}, 40),
        (dict(train_iters=405), {}, 41),
        (dict(train_iters=30), {}, 10),
        (dict(train_iters=None, train_samples=1600), {}, 20),
        (dict(train_iters=None, train_epochs=2.0), {}, evaluation.OPEN),
        (dict(eval_interval=7), dict(eval_interval=7), 7),
        (dict(valid_data=None), {}, 1000),
        (dict(valid_data=None, valid_share=0.1), {}, 40),
    ],
)
def test_a_tenth_of_the_run(args, given, steps):
    assert evaluation.interval(_args(**args), given) == steps


def test_whole_where_nobody_asks_for_a_part():
    assert evaluation.is_whole(_args(), {})
    assert not evaluation.is_whole(_args(), {"eval_iters": 3})
    assert not evaluation.is_whole(_args(valid_data=None), {})
