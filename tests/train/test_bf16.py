"""bf16 weights with fp32 gradients and masters: the loop's usual precision on GPUs."""

import pytest

from tests.train.launch import flags, run_train


@pytest.mark.parametrize("chunk", [{}, dict(loss_chunk_size=16)], ids=["route 1", "route 2"])
def test_bf16_stays_near_fp32(tiny_model, chats, chunk):
    layout = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    wide = run_train(1, *flags(tiny_model, chats))
    narrow = run_train(
        2,
        *flags(tiny_model, chats, bf16=True, use_distributed_optimizer=True, **layout, **chunk),
    )
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-2)
        assert ours["dft loss"] == pytest.approx(theirs["dft loss"], rel=3e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-1)
