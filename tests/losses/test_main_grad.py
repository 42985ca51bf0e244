"""dW goes into `main_grad` in fp32, and what autograd returns is what Megatron's hooks expect."""

import pytest
import torch

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from tests.losses.interpreted import run_kernels
from tests.losses.test_linear_head import VOCAB, make_case
from tests.ranks import run_ranks


def _hook(weight) -> None:
    """What the hook of Megatron's distributed_data_parallel.py does with a gradient."""
    added, zeroed = weight.grad_added_to_main_grad, getattr(weight, "zero_out_wgrad", False)
    if weight.grad is not None and (not added or zeroed):
        weight.main_grad.add_(weight.grad)
    weight.grad = None
    weight.grad_added_to_main_grad = False


def _two_micro_batches(dtype, design, memory, tied) -> tuple:
    """main_grad after two micro-batches, each of which uses the weight twice, as MTP does."""
    weight = torch.nn.Parameter(make_case(0, dtype)["weight"])
    weight.main_grad = torch.full(weight.shape, 0.25)
    weight.grad_added_to_main_grad = False
    if tied:
        weight.zero_out_wgrad = True
    returned = []
    for seed in (0, 1):
        total = torch.zeros(())
        for part in (0, 1):
            case = make_case(seed, dtype)
            mask = case["mask"] & (torch.arange(case["mask"].shape[1]) % 2 == part)
            out = linear_head_loss(
                case["hidden"].requires_grad_(), weight, case["labels"],
                objective=registry.get("dft"), mask=mask, vocab_size=VOCAB, loss_memory=memory,
                fuse_main_grad=True, design=design,
            )  # fmt: skip
            total = total + (out.loss * case["upstream"] * (1 + part)).sum()
        if tied:  # the embedding's own gradient, which autograd returns
            total = total + 0.5 * weight[3].float().sum()
        total.backward()
        returned.append(weight.grad is not None and weight.grad.shape == weight.shape)
        assert weight.grad_added_to_main_grad
        _hook(weight)
    return weight.main_grad, returned


def _exact(dtype, tied):
    weight = make_case(0, dtype)["weight"].double().requires_grad_()
    for seed in (0, 1):
        case = make_case(seed, dtype)
        log_p = (case["hidden"].double() @ weight[:VOCAB].t()).log_softmax(-1).transpose(0, 1)
        log_p = log_p.gather(-1, case["labels"].unsqueeze(-1)).squeeze(-1)
        twice = torch.arange(log_p.shape[1]) % 2 + 1
        loss = -log_p.detach().exp() * log_p * case["mask"] * case["upstream"] * twice
        (loss.sum() + (0.5 * weight[3].sum() if tied else 0.0)).backward()
    return weight.grad + 0.25


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("run", "design", "memory"),
    [
        (run_kernels, "keep", 1 << 20),
        (run_kernels, "keep", 1000),
        (run_ranks, "recompute", 1 << 20),
        (run_ranks, "auto", 1 << 20),
    ],
    ids=["kept", "recomputed", "torch, recompute", "torch, forward"],
)
def test_two_micro_batches_that_use_the_weight_twice(run, design, memory, tied):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        main_grad, returned = run(_two_micro_batches, 1, dtype, design, memory, tied)[0]
        expected = _exact(dtype, tied)
        assert main_grad.dtype == torch.float32 and all(returned)
        error = (main_grad.double() - expected).norm() / (expected - 0.25).norm()
        assert error <= tolerance, (dtype, float(error))
        if design == "keep" and not tied:
            assert not (main_grad[VOCAB:] - 0.25).any(), "padded rows"


def _sums(fuse) -> torch.Tensor:
    """dW of many equal micro-batches whose sum bf16 cannot hold."""
    weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
    weight.main_grad = torch.ones(16, 16)
    hidden = torch.full((4, 16), 0.001, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(8):
        out = linear_head_loss(
            hidden, weight, torch.zeros(4, dtype=torch.int64), objective=registry.get("sft"),
            fuse_main_grad=fuse,
        )  # fmt: skip
        out.loss.sum().backward()
    return weight.main_grad


def test_small_gradients_add_up_in_fp32():
    main_grad = run_kernels(_sums, 1, True)[0]
    # 8 micro-batches · 4 tokens · (p − 1) · 0.001: each below bf16's step at 1, 1/128.
    step = 8 * 4 * float(torch.tensor(0.001).bfloat16()) / 16
    torch.testing.assert_close(main_grad[1], torch.full((16,), 1 + step), rtol=1e-5, atol=0)
    assert torch.equal(run_kernels(_sums, 1, False)[0], torch.ones(16, 16)), "only if asked for"
