"""The chunked head under virtual pipeline stages and gradient accumulation trains as route 1 does.

The schedule interleaves the two virtual stages' micro-batches: whatever the head leaves in one
micro-batch's context must not be taken for another's.
"""

import functools

import pytest

from tests.train.launch import flags, largest_relative_error, run_train, weights

# Eight micro-batches of one packed row in each step; two virtual stages of one layer on each rank.
COMMON = dict(
    no_packing=None, micro_batch_size=1, global_batch_size=8, seq_length=64, train_iters=4
)
VIRTUAL = dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
COMPARED = ("lm loss", "dft/mean-prob", "dft/mean-weight", "dft/token-accuracy", "grad_norm")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, chats):
    directory = tmp_path_factory.mktemp("chunk-vpp")

    @functools.cache
    def run(name, loss):
        world_size, given = {
            "single": (1, {}),
            "virtual": (2, VIRTUAL),
            "virtual, chunked": (2, dict(loss_chunk_size=7, **VIRTUAL)),
            "virtual, tp2-sp, chunked": (
                4,
                dict(
                    loss_chunk_size=7,
                    tensor_model_parallel_size=2,
                    sequence_parallel=True,
                    **VIRTUAL,
                ),
            ),
        }[name]
        out = directory / f"{name}-{loss}"
        argv = flags(tiny_model, chats, loss=loss, save_hf=out, **COMMON, **given)
        return run_train(world_size, *argv), weights(out)

    return run


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("virtual", "dft"),
        ("virtual, chunked", "dft"),
        ("virtual, chunked", "dft-geometric"),
        ("virtual, tp2-sp, chunked", "dft"),
    ],
)
def test_the_chunked_head_under_virtual_stages(run, name, loss):
    expected, expected_weights = run("single", loss)
    got, trained = run(name, loss)
    assert len(got) == len(expected) == 4
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for figure in (*COMPARED, f"{loss} loss"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=1e-5), (step, figure)
    assert largest_relative_error(trained, expected_weights) <= 1e-5
