"""Drift logged in training equals what the exported checkpoint says; the L2-SP anchor holds it."""

import pytest
import torch

from tests.train.launch import flags, run_train, scalars, weights

LAYOUTS = {
    "tp2": dict(tensor_model_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
    "dp2-distributed-optimizer": dict(use_distributed_optimizer=True),
}


def _offline(base, tuned):
    """float64: ‖Δ‖, ‖Δ‖/‖θ₀‖, share of weights with the same bf16 value."""
    delta = sum(float((tuned[n].double() - base[n].double()).pow(2).sum()) for n in base)
    start = sum(float(base[n].double().pow(2).sum()) for n in base)
    same = sum(int((tuned[n].bfloat16() == base[n].bfloat16()).sum()) for n in base)
    return delta**0.5, (delta / start) ** 0.5, same / sum(t.numel() for t in base.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logged_drift_is_that_of_the_export(tiny_model, chats, tmp_path, layout):
    argv = flags(
        tiny_model,
        chats,
        save_hf=tmp_path / "out",
        log_drift_interval=5,
        tensorboard_dir=tmp_path / "log",
        make_vocab_size_divisible_by=64,
        **LAYOUTS[layout],
    )
    run_train(2, *argv)
    norm, relative, same = _offline(weights(tiny_model), weights(tmp_path / "out"))
    logged = scalars(tmp_path / "log")
    assert logged["drift/model/update_norm"] == pytest.approx(norm, rel=1e-4)
    assert logged["drift/model/relative_norm"] == pytest.approx(relative, rel=1e-4)
    assert logged["drift/model/unchanged_bf16"] == pytest.approx(same, abs=1e-6)


@pytest.mark.parametrize("layout", [{}, dict(use_distributed_optimizer=True)])
def test_the_anchor_lowers_the_norm_monotonically(tiny_model, chats, tmp_path, layout):
    norms = []
    for coefficient in (0.0, 20.0, 100.0):
        out = tmp_path / f"{coefficient}"
        argv = flags(tiny_model, chats, save_hf=out, l2sp_coeff=coefficient, **layout)
        run_train(2 if layout else 1, *argv)
        norms.append(_offline(weights(tiny_model), weights(out))[0])
    assert norms[0] > 1.02 * norms[1] > 1.02 * norms[2], norms


def test_a_kl_anchor_lowers_the_kl_monotonically(tiny_model, chats):
    kls = []
    for coefficient in (0.01, 1.0, 10.0):
        argv = flags(tiny_model, chats, lr=2e-2, min_lr=2e-2, train_iters=8, kl_coeff=coefficient)
        kls.append(run_train(1, *argv)[-1]["dft/kl"])
    assert kls[0] > 1.05 * kls[1] > 1.05 * kls[2], kls
    assert torch.tensor(kls).isfinite().all()
