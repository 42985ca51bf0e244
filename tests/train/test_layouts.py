"""Every layout trains to the same losses and the same exported weights as one process."""

import functools

import pytest

from tests.hf.tiny import make_tiny
from tests.train.launch import flags, largest_relative_error, run_train, weights

LAYOUTS = {
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "cp2": (2, dict(context_parallel_size=2)),
    "dp2-distributed-optimizer": (2, dict(use_distributed_optimizer=True)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, chats):
    directory = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def run(name, loss):
        world_size, layout = (1, {}) if name == "single" else LAYOUTS[name]
        out = directory / f"{name}-{loss}"
        argv = flags(tiny_model, chats, loss=loss, save_hf=out, **layout)
        return run_train(world_size, *argv), weights(out)

    return run


@pytest.mark.parametrize("loss", ["dft", "sft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_losses_and_weights_of_one_process(run, layout, loss):
    expected, expected_weights = run("single", loss)
    got, trained = run(layout, loss)
    assert len(expected) == len(got) == 5
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (step, name)
    assert largest_relative_error(trained, expected_weights) <= 1e-5


def test_the_two_losses_part(run):
    dft, _ = run("single", "dft")
    sft, _ = run("single", "sft")
    assert dft[0]["lm loss"] == pytest.approx(sft[0]["lm loss"], abs=1e-6)
    assert abs(dft[-1]["lm loss"] - sft[-1]["lm loss"]) > 1e-2


@pytest.mark.parametrize("route", [1, 2])
def test_tied_embeddings_over_tensor_and_pipeline_ranks(tmp_path_factory, chats, route):
    """The output layer has no weight of its own; the stages share the embedding."""
    directory = tmp_path_factory.mktemp("tied")
    model = make_tiny("llama-tied", directory / "model")
    chunk = {"loss_chunk_size": 16} if route == 2 else {}
    outcomes = {}
    for name in ("single", "tp2-pp2"):
        world_size, layout = (1, {}) if name == "single" else LAYOUTS[name]
        argv = flags(model, chats, save_hf=directory / name, **chunk, **layout)
        outcomes[name] = run_train(world_size, *argv), weights(directory / name)
    (expected, expected_weights), (got, trained) = outcomes["single"], outcomes["tp2-pp2"]
    for ours, theirs in zip(got, expected, strict=True):
        for name in ("lm loss", "dft loss", "grad_norm", "dft/token-accuracy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert largest_relative_error(trained, expected_weights) <= 1e-5
