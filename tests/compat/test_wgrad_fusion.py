"""Gradient accumulation fusion without apex: the numbers are autograd's, and Megatron takes it."""

import importlib
import sys

import pytest
import torch

from megatron_dft.compat import hooks, wgrad_fusion
from tests.compat import fake_packages
from tests.ranks import run_ranks

T, INPUTS, OUTPUTS = 24, 16, 40


@pytest.mark.parametrize(
    ("dtype", "main"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_it_adds_the_weight_gradient_to_what_is_there(dtype, main):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(T, INPUTS, generator=draw).to(dtype)
    dy = torch.randn(T, OUTPUTS, generator=draw).to(dtype)
    main_grad = torch.randn(OUTPUTS, INPUTS, generator=draw).to(main)
    weight = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64, requires_grad=True)
    (torch.nn.functional.linear(x.double(), weight) * dy.double()).sum().backward()
    expected = main_grad.double() + weight.grad
    add = (
        wgrad_fusion.wgrad_gemm_accum_fp32
        if main == torch.float32
        else wgrad_fusion.wgrad_gemm_accum_fp16
    )
    add(x, dy, main_grad)
    bound = 2e-6 if main == torch.float32 else 1e-2
    assert (main_grad.double() - expected).norm() <= bound * expected.norm()


def _layer(install):
    """Megatron's output layer under fusion over two micro-batches: main_grad, and autograd's."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    from megatron_dft.cpu import runtime

    runtime.activate()
    if install:
        wgrad_fusion.install()
        wgrad_fusion.install()
    parallel_state.initialize_model_parallel()
    config = ModelParallelConfig(
        gradient_accumulation_fusion=True, use_cpu_initialization=True, perform_initialization=False
    )
    layer = tensor_parallel.ColumnParallelLinear(
        INPUTS, OUTPUTS, config=config, init_method=torch.nn.init.ones_, bias=False
    )
    weight = layer.weight
    with torch.no_grad():
        weight.copy_(torch.randn(OUTPUTS, INPUTS))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(OUTPUTS, INPUTS), False
    plain = weight.detach().clone().requires_grad_()
    for _ in range(2):
        x, dy = torch.randn(T, 1, INPUTS), torch.randn(T, 1, OUTPUTS)
        (layer(x.requires_grad_())[0] * dy).sum().backward()
        (torch.nn.functional.linear(x.detach(), plain) * dy).sum().backward()
    found = weight.main_grad, plain.grad, weight.grad_added_to_main_grad
    hooks.undo()
    return *found, hooks.is_provided(wgrad_fusion.NAME)


def test_megatron_s_output_layer_adds_to_main_grad_by_it():
    main_grad, expected, marked, left = run_ranks(_layer, 1, True)[0]
    torch.testing.assert_close(main_grad, expected, rtol=1e-5, atol=1e-5)
    assert marked and not left


def test_without_it_megatron_builds_no_layer():
    """The reason why it is there; a release that needs it no longer turns this red."""
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        run_ranks(_layer, 1, False)


def test_apex_s_own_module_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_packages.write(tmp_path, wgrad_fusion.NAME))
    wgrad_fusion.install()
    module = importlib.import_module(wgrad_fusion.NAME)
    del sys.modules[wgrad_fusion.NAME]
    assert module.is_apex and not hooks.is_provided(wgrad_fusion.NAME)
