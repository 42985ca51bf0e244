"""Every layout trains to the same losses and the same exported weights as one process."""

import pytest

from tests.hf.tiny import make_tiny
from tests.train.launch import assert_same_training

LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "cp2": (2, dict(context_parallel_size=2)),
    "dp2-distributed-optimizer": (2, dict(use_distributed_optimizer=True)),
}


@pytest.mark.parametrize("loss", ["dft", "sft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_and_weights_of_one_process(train_once, layout, loss):
    world_size, given = LAYOUTS[layout]
    got = train_once(world_size, loss=loss, **given)
    assert len(got[0]) == 5
    assert_same_training(got, train_once(1, loss=loss))


def test_the_two_losses_part(train_once):
    (dft, _), (sft, _) = train_once(1, loss="dft"), train_once(1, loss="sft")
    assert dft[0]["lm loss"] == pytest.approx(sft[0]["lm loss"], abs=1e-6)
    assert abs(dft[-1]["lm loss"] - sft[-1]["lm loss"]) > 1e-2


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
    return make_tiny("llama-tied", tmp_path_factory.mktemp("tied") / "model")


@pytest.mark.parametrize("route", [1, 2])
def test_tied_embeddings_over_tensor_and_pipeline_ranks(tied_model, train_once, route):
    """The output layer has no weight of its own; the stages share the embedding."""
    chunk = {"loss_chunk_size": 16} if route == 2 else {}
    world_size, layout = LAYOUTS["tp2-pp2"]
    compared = ("lm loss", "dft loss", "grad_norm", "dft/token-accuracy")
    got = train_once(world_size, tied_model, **chunk, **layout)
    assert_same_training(got, train_once(1, tied_model, **chunk), compared)
