"""A checkpoint goes on in another layout: the same weights, the same samples in the same order."""

import shutil

import pytest

from tests.recovery.runs import rows_of_steps, run
from tests.train.launch import flags, largest_relative_error, weights

STEPS, SAVED = 4, 2
# As in examples/configs/recipe.sh.
RECIPE = dict(use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=True)
LAYOUTS = {
    "tp1": (1, {}),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
}


def go(ranks, model, data, directory, **given):
    # The scheduler compares the number of steps otherwise.
    given |= dict(
        loss="dft", save_interval=SAVED, load=directory, override_opt_param_scheduler=True
    )
    words = flags(model, data, **RECIPE, **given)
    ended = run(ranks, *words, status=directory.with_suffix(".status"))
    assert ended.word == "finished"
    return ended


@pytest.fixture(scope="module")
def tp2(tiny_model, chats, tmp_path_factory):
    """TP 2 from start to end, its checkpoint of step 2, and the weights of that step."""
    directory = tmp_path_factory.mktemp("tp2")
    given = dict(tensor_model_parallel_size=2, save=directory / "c")
    exported = directory / "hf"
    go(2, tiny_model, chats, directory / "c", train_iters=SAVED, save_hf=exported, **given)
    shutil.copytree(directory / "c", directory / "saved")
    rest = go(2, tiny_model, chats, directory / "c", train_iters=STEPS, **given)
    rest.saved, rest.weights = directory / "saved", weights(exported)
    return rest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on(layout, tp2, tiny_model, chats, tmp_path):
    ranks, given = LAYOUTS[layout]
    # No step: only loaded and exported.
    there = tmp_path / "hf"
    go(ranks, tiny_model, chats, tp2.saved, train_iters=SAVED, save_hf=there, **given)
    assert largest_relative_error(weights(there), tp2.weights) == 0
    rest = go(ranks, tiny_model, chats, tp2.saved, train_iters=STEPS, **given)
    assert rows_of_steps(rest.rows) == rows_of_steps(tp2.rows)
    assert [s["step"] for s in rest.steps] == [3, 4]
    assert rest.steps == [pytest.approx(step, rel=1e-4, abs=1e-6) for step in tp2.steps]
