"""Route 1 (Megatron's cross entropy) and route 2 (the chunked head) train alike, for every loss."""

import functools

import pytest

from tests.train.launch import flags, largest_relative_error, run_train, weights

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


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, chats):
    directory = tmp_path_factory.mktemp("routes")

    @functools.cache
    def run(route, layout):
        world_size, given = LAYOUTS[layout]
        out = directory / f"{route}-{layout}"
        chunk = {"loss_chunk_size": 16} if route == 2 else {}
        argv = flags(tiny_model, chats, train_iters=20, save_hf=out, **chunk, **given)
        return run_train(world_size, *argv), weights(out)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_both_routes(run, layout):
    expected, expected_weights = run(1, "single")
    got, trained = run(2, layout)
    assert len(got) == len(expected) == 20
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (step, name)
    assert largest_relative_error(trained, expected_weights) <= 1e-4


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
