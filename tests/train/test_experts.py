"""Mixture of experts: expert- and tensor-parallel layouts train as one process does."""

import pytest

from tests.hf.tiny import make_tiny
from tests.train.launch import flags, largest_relative_error, run_train, weights

LAYOUTS = {
    "ep2": dict(expert_model_parallel_size=2),
    "tp2-sp-ep2": dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_tiny("qwen3-moe", tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture(scope="module")
def single(moe, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "out"
    return run_train(1, *flags(moe, chats, save_hf=out)), weights(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_layouts(moe, chats, single, tmp_path, layout):
    got = run_train(2, *flags(moe, chats, save_hf=tmp_path / "out", **LAYOUTS[layout]))
    expected, expected_weights = single
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in ("lm loss", "dft loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (step, name)
    assert largest_relative_error(weights(tmp_path / "out"), expected_weights) <= 1e-4
