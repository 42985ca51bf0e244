"""What a GPU can do with and without Transformer Engine and apex; no GPU is needed to ask."""

import argparse

import pytest

from megatron_dft.compat import wgrad_fusion
from megatron_dft.flags import defaults, device
from tests.compat import fake_packages


@pytest.mark.parametrize("apex", [True, False])
@pytest.mark.parametrize("te", [True, False])
def test_defaults_of_a_gpu(te, apex, tmp_path, monkeypatch):
    names = ["transformer_engine"] * te + ["apex", wgrad_fusion.NAME] * apex
    monkeypatch.syspath_prepend(fake_packages.write(tmp_path, *names))
    found = defaults.gpu_defaults()
    # Fusion is left on everywhere: by apex's module, or by the one that stands in for it.
    assert "gradient_accumulation_fusion" not in found
    assert wgrad_fusion.is_apex_there() is apex
    assert found == ({} if te else defaults.WITHOUT_TE)
    assert defaults.gpu_defaults("local") == defaults.WITHOUT_TE


def _args(**given):
    plain = {
        "transformer_impl": "transformer_engine",
        "no_packing": True,
        "require_fused_attention": False,
        "use_cpu_initialization": False,
        "async_save": False,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "moe_grouped_gemm": False,
        "fp8": None,
    }
    return argparse.Namespace(**{**plain, **given})


LOCAL = {
    "packed rows": (dict(no_packing=False), "--no-packing.*install transformer-engine"),
    "sequence parallelism": (dict(sequence_parallel=True), "--sequence-parallel.*norm"),
    "context parallelism": (dict(context_parallel_size=2), "--context-parallel-size.*attention"),
    "grouped experts": (dict(moe_grouped_gemm=True), "--moe-grouped-gemm"),
    "fp8": (dict(fp8="hybrid"), "--fp8"),
}


@pytest.mark.parametrize("name", LOCAL)
def test_megatron_s_own_layers_refuse_on_a_gpu(name):
    given, message = LOCAL[name]
    args = _args(transformer_impl="local", **given)
    with pytest.raises(ValueError, match=message) as error:
        device.check(args, on_cpu=False)
    assert "\n" not in str(error.value)
    device.check(args, on_cpu=True)


def test_plain_rows_need_no_transformer_engine():
    device.check(_args(transformer_impl="local"), on_cpu=False)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_layers_that_are_not_there(on_cpu):
    with pytest.raises(ValueError, match="--transformer-impl: expected local"):
        device.check(_args(), on_cpu)


def test_weights_on_the_cpu_of_a_gpu_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_packages.write(tmp_path, "transformer_engine"))
    with pytest.raises(ValueError, match="--use-cpu-initialization"):
        device.check(_args(use_cpu_initialization=True), on_cpu=False)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_fused_attention_where_there_is_none(on_cpu):
    args = _args(transformer_impl="local", require_fused_attention=True)
    with pytest.raises(ValueError, match="--require-fused-attention: expected a GPU"):
        device.check(args, on_cpu)
