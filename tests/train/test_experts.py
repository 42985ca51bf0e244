"""Mixture of experts: expert- and tensor-parallel layouts train as one process does."""

import pytest

from tests.hf.tiny import make_tiny
from tests.train.launch import assert_same_training

LAYOUTS = {
    "ep2": dict(expert_model_parallel_size=2),
    # As examples/configs/qwen3-30b-a3b.sh, but for the grouped kernels.
    "ep2-alltoall-recomputed": dict(
        expert_model_parallel_size=2,
        moe_token_dispatcher_type="alltoall",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    ),
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_layouts(train_once, moe, layout):
    got = train_once(2, moe, **LAYOUTS[layout])
    compared = ("lm loss", "dft loss", "grad_norm")
    assert_same_training(got, train_once(1, moe), compared, weights_within=1e-4)
