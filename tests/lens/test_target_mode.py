"""The target mode in training: it holds its value, in any layout, and goes on after a resume."""

import pytest

from tests.chats import write_chats
from tests.flags.refused import refused
from tests.hf.tiny import make_tiny
from tests.train.launch import flags, largest_relative_error, run_train, tolerate_exit, weights


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Model and data; a cache of their own for the ranks."""
    directory = tmp_path_factory.mktemp("targets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_DFT_DATA_CACHE", str(directory / "cache"))
        yield (
            make_tiny("llama", directory / "m", num_hidden_layers=2),
            write_chats(directory / "chats.jsonl"),
        )


NORM = dict(l2sp_coeff=5.0, relative_norm_target=0.06)
KL = dict(kl_coeff=0.3, kl_target=0.15)
# Fast enough that both quantities would be far above their targets without an anchor.
RATE = dict(lr=4e-3, min_lr=4e-3, seq_length=48)
SERIES = {"norm": ("dft/relative-norm", "dft/l2sp-coeff"), "kl": ("dft/kl", "dft/kl-coeff")}


def _train(given, steps, world_size=1, **more):
    return run_train(world_size, *flags(*given, train_iters=steps, **RATE, **more))


@pytest.mark.parametrize(
    ("mode", "target", "start", "steps"),
    # The far start takes the KL past its target first: time to come back.
    [
        ("norm", 0.06, 5.0, 120),
        ("norm", 0.06, 60.0, 120),
        ("kl", 0.15, 0.3, 120),
        pytest.param("kl", 0.3, 3.0, 220, marks=pytest.mark.slow),
    ],
)
def test_the_target_is_held(given, mode, target, start, steps):
    """Mean of the last 40 steps within 10 %, from coefficients on both sides."""
    names = ("l2sp_coeff", "relative_norm_target") if mode == "norm" else ("kl_coeff", "kl_target")
    heard = _train(given, steps, **dict(zip(names, (start, target), strict=True)))
    quantity, coefficient = SERIES[mode]
    last = [step[quantity] for step in heard[-40:]]
    coefficients = [step[coefficient] for step in heard]
    assert sum(last) / len(last) == pytest.approx(target, rel=0.1), (last, coefficients[::10])
    assert coefficients[0] == pytest.approx(start) and len(set(coefficients)) > 60
    if steps == 120 and mode == "kl":  # not by chance: the start alone ends elsewhere
        free = [step["dft/kl"] for step in _train(given, 120, kl_coeff=start)[-40:]]
        assert sum(free) / len(free) != pytest.approx(target, rel=0.2)


LAYOUTS = {
    "tp2": dict(tensor_model_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
    "dp2-distributed-optimizer": dict(use_distributed_optimizer=True),
}


@pytest.fixture(scope="module")
def one_process(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    return _train(given, 10, save_hf=out, **NORM, **KL), weights(out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adapts_as_one_process_does(given, one_process, tmp_path, layout):
    out = tmp_path / "out"
    heard = _train(given, 10, 2, save_hf=out, **NORM, **KL, **LAYOUTS[layout])
    alone, alone_weights = one_process
    for names in SERIES.values():
        for name in names:
            # The norm of a step is known after it: the first step logs none.
            want, got = ([s[name] for s in steps if name in s] for steps in (alone, heard))
            assert len(want) == (9 if name == "dft/relative-norm" else 10)
            assert got == pytest.approx(want, rel=1e-3, abs=1e-7), name
    assert largest_relative_error(weights(out), alone_weights) < 1e-4


def _coefficients_of_ranks():
    """Let every rank say its coefficients in the end."""
    import torch.distributed as dist

    from megatron_dft.training import output

    plain = output.Output.finish

    def finish(self):
        mine = (self.args.kl_coeff, [a.coefficient for a in self.handle.lens.anchors])
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        assert all(other == mine for other in everyone), everyone
        assert mine[0] != KL["kl_coeff"] and mine[1][0] != NORM["l2sp_coeff"]
        plain(self)

    output.Output.finish = finish


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2-distributed-optimizer"])
def test_all_ranks_have_the_same_coefficient(given, layout):
    argv = flags(*given, train_iters=4, **RATE, **NORM, **KL, **LAYOUTS[layout])
    run_train(2, *argv, before=_coefficients_of_ranks)


def test_a_resumed_run_goes_on_with_its_coefficients(given, one_process, tmp_path):
    common = dict(**RATE, **NORM, **KL, train_iters=10)
    saving = dict(save=tmp_path / "c", save_interval=5, exit_interval=5)
    first = run_train(1, *flags(*given, **saving, **common), before=tolerate_exit)
    rest = run_train(1, *flags(*given, load=tmp_path / "c", **common))
    whole, _ = one_process
    for name in ("dft/kl", "dft/kl-coeff", "dft/l2sp-coeff", "lm loss"):
        got = [s[name] for s in first + rest]
        assert got == pytest.approx([s[name] for s in whole], rel=1e-4), name
    # Another start does not matter to a resumed run, and --finetune starts afresh.
    again = run_train(1, *flags(*given, load=tmp_path / "c", **{**common, "l2sp_coeff": 9.0}))
    assert again[0]["dft/l2sp-coeff"] == pytest.approx(whole[5]["dft/l2sp-coeff"], rel=1e-4)
    fresh = run_train(
        1, *flags(*given, load=tmp_path / "c", finetune=True, **{**common, "train_iters": 1})
    )
    assert fresh[0]["dft/l2sp-coeff"] == pytest.approx(NORM["l2sp_coeff"])


REFUSALS = {
    "no KL coefficient": (dict(kl_target=0.1), ["--kl-target", "--kl-coeff", "give both"]),
    "asft's own term": (dict(loss="asft", kl_target=0.1), ["--kl-target", "--kl-coeff"]),
    "no anchor": (dict(relative_norm_target=0.1), ["--relative-norm-target", "--l2sp-coeff"]),
    "no number": (dict(kl_coeff=0.1, kl_target=-1.0), ["--kl-target", "above 0", "-1.0"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_targets_without_what_they_need(given, case):
    wrong, words = REFUSALS[case]
    ((status, text),) = refused(1, flags(*given, **wrong))
    assert status == 2 and len(text.splitlines()) == 1, text
    for word in words:
        assert word in text
