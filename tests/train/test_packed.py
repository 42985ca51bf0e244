"""Packed rows: the same training in every layout, and the same figures as unpacked rows."""

import pytest

from tests.train.launch import (
    assert_same_training,
    flags,
    largest_relative_error,
    run_train,
    weights,
)

LAYOUTS = {
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
    "dp2": (2, {}),
    "cp2": (2, dict(context_parallel_size=2)),
    "pp2-virtual": (
        2,
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    ),
}
PACKED = dict(no_packing=None, micro_batch_size=1, seq_length=96, train_iters=3)
COMPARED = ("lm loss", "dft loss", "dft/mean-prob", "dft/token-accuracy", "grad_norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_layouts_train_alike(train_once, layout):
    world_size, given = LAYOUTS[layout]
    got = train_once(world_size, **PACKED, **given)
    assert_same_training(got, train_once(1, **PACKED), COMPARED)


def test_one_epoch_packed_equals_one_epoch_unpacked(tiny_model, chats, tmp_path):
    """One step over all 48 conversations: same mean loss, same gradient, so the same weights."""
    from megatron_dft.data.dataset import build_dataset
    from megatron_dft.data.options import DatasetOptions
    from megatron_dft.data.tokenizer import load_tokenizer

    rows = build_dataset(
        [chats], load_tokenizer(tiny_model), DatasetOptions(seq_length=96, seed=1234)
    )
    outs = {}
    for name, given in {
        "unpacked": dict(global_batch_size=48, micro_batch_size=4),
        "packed": dict(global_batch_size=rows.rows_per_pass, micro_batch_size=1, no_packing=None),
    }.items():
        argv = flags(
            tiny_model, chats, seq_length=96, train_iters=1, save_hf=tmp_path / name, **given
        )
        outs[name] = run_train(1, *argv), weights(tmp_path / name)
    (one,), (other,) = outs["packed"][0], outs["unpacked"][0]
    assert rows.rows_per_pass < 48
    for figure in ("lm loss", "dft loss", "grad_norm", "dft/token-accuracy"):
        assert one[figure] == pytest.approx(other[figure], abs=1e-5), figure
    assert largest_relative_error(outs["packed"][1], outs["unpacked"][1]) <= 1e-4
