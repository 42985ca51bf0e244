"""The chunked head under virtual pipeline stages and gradient accumulation trains as route 1 does.

The schedule interleaves the two virtual stages' micro-batches: whatever the head leaves in one
micro-batch's context must not be taken for another's.
"""

import pytest

from tests.train.launch import assert_same_training

# Eight micro-batches of one packed row in each step; two virtual stages of one layer on each rank.
COMMON = dict(
    no_packing=None, micro_batch_size=1, global_batch_size=8, seq_length=64, train_iters=4
)
VIRTUAL = dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
COMPARED = ("lm loss", "dft/mean-prob", "dft/mean-weight", "dft/token-accuracy", "grad_norm")


LAYOUTS = {
    "virtual": (2, VIRTUAL),
    "virtual, chunked": (2, dict(loss_chunk_size=7, **VIRTUAL)),
    "virtual, tp2-sp, chunked": (
        4,
        dict(loss_chunk_size=7, tensor_model_parallel_size=2, sequence_parallel=True, **VIRTUAL),
    ),
}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("virtual", "dft"),
        ("virtual, chunked", "dft"),
        ("virtual, chunked", "dft-geometric"),
        ("virtual, tp2-sp, chunked", "dft"),
    ],
)
def test_the_chunked_head_under_virtual_stages(train_once, name, loss):
    world_size, given = LAYOUTS[name]
    got = train_once(world_size, loss=loss, **COMMON, **given)
    assert len(got[0]) == 4
    expected = train_once(1, loss=loss, **COMMON)
    assert_same_training(got, expected, (*COMPARED, f"{loss} loss"))
