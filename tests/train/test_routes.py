"""Route 1 (Megatron's cross entropy) and route 2 (the chunked head) train alike, for every loss."""

import pytest

from tests.train.launch import assert_same_training, flags, run_train

LAYOUTS = {
    "single": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "tp2-sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}
COMPARED = (
    "lm loss",
    "dft loss",
    "dft/mean-prob",
    "dft/mean-weight",
    "dft/token-accuracy",
    "grad_norm",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_both_routes(train_once, layout):
    world_size, given = LAYOUTS[layout]
    got = train_once(world_size, train_iters=20, loss_chunk_size=16, **given)
    assert len(got[0]) == 20
    assert_same_training(got, train_once(1, train_iters=20), COMPARED, weights_within=1e-4)


WAYS = {
    "chosen by itself": dict(loss_route="auto"),
    "our cross entropy": dict(cross_entropy="vocab-parallel"),
    "head in a small memory": dict(loss_route="head", loss_memory=0.02),
    "our cross entropy, tp2": dict(cross_entropy="vocab-parallel", tensor_model_parallel_size=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_twenty_steps_of_every_way(train_once, way):
    ranks = WAYS[way].get("tensor_model_parallel_size", 1)
    got = train_once(ranks, train_iters=20, **WAYS[way])
    assert_same_training(got, train_once(1, train_iters=20), COMPARED, weights_within=1e-4)


def _interpret():
    """The Triton kernels run on the CPU then, and the run takes them as it would on a GPU."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"


@pytest.mark.parametrize("loss", ["dft", "asft"])
@pytest.mark.parametrize("route", ["head", "logits"])
def test_twenty_steps_with_the_kernels(tiny_model, chats, route, loss):
    common = dict(loss=loss, train_iters=20, micro_batch_size=1, global_batch_size=1)
    expected = run_train(1, *flags(tiny_model, chats, **common))
    got = run_train(1, *flags(tiny_model, chats, loss_route=route, **common), before=_interpret)
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in ("lm loss", f"{loss} loss", "dft/mean-weight", "dft/token-accuracy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (step, name)


LOSSES = {
    "dft-sequence": {},
    "dft-geometric": {},
    "dft-mix": dict(dft_mix_alpha=0.3),
    "p-alpha": dict(dft_p_alpha=0.5),
    "talr": {},
    "chord-phi": {},
    "eaft": {},
    "deft": {},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_kind_of_objective_in_both_routes(tiny_model, chats, loss):
    """Packed rows; route 1 on one rank against route 2 at TP2."""
    common = dict(
        loss=loss, train_iters=3, no_packing=None, micro_batch_size=1, global_batch_size=4,
        **LOSSES[loss],
    )  # fmt: skip
    one = run_train(1, *flags(tiny_model, chats, **common))
    two = run_train(
        2,
        *flags(tiny_model, chats, **common, tensor_model_parallel_size=2, loss_chunk_size=7),
    )
    for ours, theirs in zip(two, one, strict=True):
        for name in ("lm loss", f"{loss} loss", "dft/mean-weight", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_the_share_of_filtered_rows_is_logged(tiny_model, chats):
    """Over two data-parallel ranks, of the rows of both; a generous bound leaves many out."""
    argv = flags(tiny_model, chats, loss_row_filter=0.2, train_iters=2)
    alone, two = run_train(1, *argv), run_train(2, *argv)
    for ours, theirs in zip(alone, two, strict=True):
        assert 0.05 < ours["dft/rows-dropped"] < 0.95
        assert ours["dft/rows-dropped"] == pytest.approx(theirs["dft/rows-dropped"], abs=0.05)
