"""Both overlaps of the distributed optimizer change no number, in either route of the loss."""

import pytest

from tests.train.launch import flags, largest_relative_error, run_train, weights

COMMON = dict(train_iters=3, global_batch_size=8)
# A bucket a parameter or so: the output layer's weight is gathered for itself.
OVERLAPS = dict(
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    ddp_bucket_size=1000,
)


@pytest.fixture(scope="module")
def expected(tiny_model, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    return run_train(2, *flags(tiny_model, chats, save_hf=out, **COMMON)), weights(out)


def _run(tiny_model, chats, tmp_path, before=None, **route):
    out = tmp_path / "out"
    argv = flags(tiny_model, chats, save_hf=out, **COMMON, **OVERLAPS, **route)
    return run_train(2, *argv, before=before), weights(out)


@pytest.mark.parametrize("route", [{}, dict(loss_chunk_size=16)])
def test_overlapped_gathers(tiny_model, chats, tmp_path, expected, route):
    figures, found = _run(tiny_model, chats, tmp_path, **route)
    for ours, theirs in zip(figures, expected[0], strict=True):
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert largest_relative_error(found, expected[1]) <= 1e-5


def _weight_is_not_waited_for():
    from megatron_dft.step import chunked_head

    chunked_head._wait_for_weight = lambda *args: None


def test_without_the_layer_s_hooks_a_gather_is_left_open(tiny_model, chats, tmp_path):
    """Megatron's own assertion: a bucket whose gather nobody waited for."""
    with pytest.raises(AssertionError):
        _run(tiny_model, chats, tmp_path, before=_weight_is_not_waited_for, loss_chunk_size=16)
