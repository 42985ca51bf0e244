"""Multi-token prediction heads: plain by default, weighted by --dft-mtp; the main head as ever."""

import functools

import pytest
import torch

from tests.train.launch import flags, run_train, tolerate_exit

MTP = dict(mtp_num_layers=1, mtp_loss_scaling_factor=0.3)


def _hear_mtp():
    """Put the heads' loss, which Megatron logs apart, among the figures of each step."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_dft.compat import loop

    install = loop.on_training_log

    def on_training_log(before):
        def also(losses, call):
            tracker = MTPLossLoggingHelper.tracker
            if losses:
                losses["mtp"] = tracker["loss_values"].sum().clone()
            before(losses, call)

        install(also)

    loop.on_training_log = on_training_log


@pytest.fixture(scope="module")
def start(tiny_model, chats, tmp_path_factory):
    """A checkpoint with heads: their random weights would differ from layout to layout."""
    directory = tmp_path_factory.mktemp("mtp") / "start"
    argv = flags(tiny_model, chats, save=directory, save_interval=1, exit_interval=1, **MTP)
    run_train(1, *argv, before=tolerate_exit)
    return directory


@pytest.fixture(scope="module")
def run(tiny_model, chats, start):
    @functools.cache
    def run(loss, weigh, tensor_parallel=1):
        argv = flags(
            tiny_model, chats, loss=loss, dft_mtp=weigh,
            load=start, allow_change="loss", tensor_model_parallel_size=tensor_parallel,
            sequence_parallel=tensor_parallel > 1, **MTP,
        )  # fmt: skip
        return run_train(tensor_parallel, *argv, before=_hear_mtp)

    return run


def test_the_heads_are_plain_unless_asked(run):
    plain, dft, both = run("sft", False), run("dft", False), run("dft", True)
    # First step: the same weights, so the same cross entropy of the heads; weighted it is less.
    assert dft[0]["mtp"] == pytest.approx(plain[0]["mtp"], abs=1e-5)
    assert both[0]["mtp"] < 0.1 * dft[0]["mtp"]
    for name in ("lm loss", "dft loss", "dft/mean-prob", "dft/token-accuracy"):
        assert both[0][name] == pytest.approx(dft[0][name], abs=1e-6), name
    assert both[0]["grad_norm"] != pytest.approx(dft[0]["grad_norm"], rel=1e-2)


def test_the_heads_under_tensor_parallelism(run):
    for ours, theirs in zip(run("dft", True, 2), run("dft", True), strict=True):
        for name in ("lm loss", "dft loss", "dft/token-accuracy", "mtp", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def _fused():
    """Gradient accumulation fusion on the CPU too, by the stand-in for apex's module."""
    from megatron_dft.compat import wgrad_fusion
    from megatron_dft.flags import defaults

    wgrad_fusion.install()
    defaults.CPU_DEFAULTS["gradient_accumulation_fusion"] = True


def test_the_chunked_head_and_the_heads_add_to_one_main_grad(tiny_model, chats, start):
    """Megatron's calls for the heads mark the weight as added, and DDP drops what autograd has."""
    argv = flags(
        tiny_model, chats, load=start, loss="sft", allow_change="loss",
        loss_chunk_size=16, train_iters=3, **MTP,
    )  # fmt: skip
    plain, fused = run_train(1, *argv), run_train(1, *argv, before=_fused)
    for ours, theirs in zip(fused, plain, strict=True):
        for name in ("lm loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_the_heads_gradient_is_the_formula_s():
    from types import SimpleNamespace

    from megatron_dft.losses import registry
    from megatron_dft.step.logits_probe import LogitsProbe

    def cross_entropy(labels, logits):
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.T.reshape(-1), reduction="none", ignore_index=-100
        )
        return flat.view(labels.T.shape).T

    model = SimpleNamespace(compute_language_model_loss=cross_entropy, training=True)
    LogitsProbe(model, registry.get("dft"), weigh_mtp=True)
    logits = torch.randn(5, 2, 7, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 3] = -100
    loss = model.compute_language_model_loss.for_mtp(labels, logits)
    upstream = torch.rand(2, 5)
    (loss * upstream).sum().backward()
    softmax = logits.detach().softmax(-1)
    target = labels.T.clamp(min=0)
    p = softmax.gather(-1, target[..., None])
    supervised = (labels.T >= 0)[..., None]
    formula = p * (softmax - torch.nn.functional.one_hot(target, 7))
    expected = torch.where(supervised, upstream.T[..., None] * formula, 0.0)
    assert torch.allclose(logits.grad, expected, atol=1e-6)
