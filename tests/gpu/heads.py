"""The losses' kernels on a GPU at real vocabulary sizes, against float64.

`python -m tests.gpu.heads`, or pytest, which a machine with a GPU may lack; status 0 only if all
hold.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_dft.losses import kernels, registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.row_filter import RowFilter
from megatron_dft.losses.vocab_parallel import vocab_parallel_loss, vocab_parallel_statistics
from tests.losses.reference import (
    PARAMETERS,
    data_stats,
    entropy_of_top,
    relative_error,
)
from tests.losses.vocab_cases import exact, ours

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# A vocabulary that is no multiple of anything, one of many tiles, one of a few columns.
VOCABULARIES = (50_257, 131_072, 300)
MIB = 1 << 20


def norm_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def logits_case(vocab: int, dtype: torch.dtype, tokens: int = 67) -> dict:
    g = torch.Generator("cuda").manual_seed(vocab)
    logits = 2.5 * torch.randn(tokens, vocab, generator=g, device="cuda")
    target = torch.randint(vocab, (tokens,), generator=g, device="cuda")
    likely = 12 * torch.rand(tokens, generator=g, device="cuda")
    logits[torch.arange(tokens, device="cuda"), target] += likely
    reference = logits + 0.5 * torch.randn(tokens, vocab, generator=g, device="cuda")
    supervised = torch.rand(tokens, generator=g, device="cuda") < 0.6
    scale = 512.0 if dtype == torch.float16 else 1.0
    return {
        "logits": logits.to(dtype),
        "reference": reference.to(dtype),
        "target": torch.where(supervised, target, -100),
        "segments": torch.arange(tokens, device="cuda") // 9,
        "upstream": scale * torch.randn(tokens, generator=g, device="cuda"),
    }


def every_objective_from_logits(vocab: int, dtype: torch.dtype) -> None:
    case = logits_case(vocab, dtype)
    assert kernels.serve(case["logits"])
    for number, name in enumerate(PARAMETERS):
        want, want_grad = exact(name, case)
        got, _, grad = ours(name, case, None, overwrite_logits=number % 2 == 0)
        assert relative_error(got, want) <= 2e-5, name
        assert norm_error(grad, want_grad) <= DTYPES[dtype], name
        assert not grad[case["target"] == -100].any(), name


def statistics_top_k_and_ties(vocab: int) -> None:
    case = logits_case(vocab, torch.bfloat16)
    case["logits"][0, [5, 200]] = case["logits"][1, [5, 200]] = 40.0
    target = torch.where(case["target"] == -100, 7, case["target"])
    target[0], target[1] = 5, 200
    logits = case["logits"].requires_grad_()
    found = vocab_parallel_statistics(
        logits, target, entropy=True, entropy_top20=True, sum_sq_prob=True
    )
    log_p = logits.detach().double().log_softmax(-1)
    p = log_p.exp()
    assert relative_error(found.entropy.detach(), -(p * log_p).sum(-1)) <= 1e-5
    assert relative_error(found.entropy_top20.detach(), entropy_of_top(log_p)) <= 1e-5
    assert relative_error(found.sum_sq_prob.detach(), p.square().sum(-1)) <= 1e-5
    assert torch.equal(found.is_top1, target == (p == p.amax(-1, keepdim=True)).int().argmax(-1))
    assert found.is_top1[0] and not found.is_top1[1]


def head_case(dtype: torch.dtype, tokens=512, hidden=512, vocab=8192) -> dict:
    g = torch.Generator("cuda").manual_seed(3)
    weight = torch.randn(vocab, hidden, generator=g, device="cuda") * 3 / hidden**0.5
    labels = torch.randint(vocab - 100, (tokens,), generator=g, device="cuda")
    states = torch.randn(tokens, hidden, generator=g, device="cuda") + 0.5 * weight[labels]
    return {
        "hidden": states.to(dtype),
        "weight": weight.to(dtype),
        "labels": labels,
        "mask": torch.rand(tokens, generator=g, device="cuda") < 0.6,
        "upstream": torch.randn(tokens, generator=g, device="cuda"),
    }


def exact_head(case: dict, vocab_size: int) -> tuple:
    """(loss, d_hidden, dW) of DFT in float64 on unrounded logits."""
    hidden, weight = case["hidden"].double(), case["weight"].double()
    hidden.requires_grad_(), weight.requires_grad_()
    log_p = (hidden @ weight[:vocab_size].t()).log_softmax(-1)
    log_p = log_p.gather(1, case["labels"].unsqueeze(1)).squeeze(1)
    loss = torch.where(case["mask"], -log_p.detach().exp() * log_p, 0.0)
    loss.backward(case["upstream"].double())
    return loss.detach(), hidden.grad, weight.grad


def the_head_and_its_memory(dtype: torch.dtype, memory: int) -> None:
    case = head_case(dtype)
    vocab = len(case["weight"])
    loss, d_hidden, d_weight = exact_head(case, vocab - 90)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_head_loss(
        hidden, weight, case["labels"], objective=registry.get("dft"), mask=case["mask"],
        vocab_size=vocab - 90, loss_memory=memory,
    )  # fmt: skip
    out.loss.backward(case["upstream"])
    returned = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    rows = 2 * case["hidden"].numel() * case["hidden"].element_size()  # gathered, scattered
    assert torch.cuda.max_memory_allocated() - before - returned <= memory + rows + 2 * MIB
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert norm_error(out.loss.detach(), loss) <= tolerance
    assert norm_error(hidden.grad, d_hidden) <= tolerance
    assert norm_error(weight.grad, d_weight) <= tolerance
    assert not weight.grad[vocab - 90 :].any()


def dw_in_main_grad_over_two_micro_batches_and_two_uses() -> None:
    case = head_case(torch.bfloat16)
    vocab = len(case["weight"])
    weight = torch.nn.Parameter(case["weight"])
    weight.main_grad = torch.full(weight.shape, 0.125, device="cuda")
    weight.grad_added_to_main_grad = False
    expected = torch.zeros(weight.shape, dtype=torch.float64, device="cuda")
    for turn in range(2):
        total = torch.zeros((), device="cuda")
        for use in range(2):
            part = {
                **case,
                "mask": case["mask"] & (torch.arange(512, device="cuda") % 4 == turn + use),
            }
            expected += exact_head(part, vocab)[2]
            out = linear_head_loss(
                case["hidden"].requires_grad_(), weight, case["labels"], mask=part["mask"],
                objective=registry.get("dft"), fuse_main_grad=True, loss_memory=4 * MIB,
            )  # fmt: skip
            total = total + (out.loss * case["upstream"]).sum()
        total.backward()
        assert weight.grad_added_to_main_grad and weight.grad is not None
        weight.grad, weight.grad_added_to_main_grad = None, False
    assert norm_error(weight.main_grad - 0.125, expected) <= 1e-2


def the_row_filter_changes_the_gradient_within_its_bound() -> None:
    case = head_case(torch.bfloat16)
    weights, row_filter = [], RowFilter(1e-2)
    for chosen in (None, row_filter):
        weight = case["weight"].clone().requires_grad_()
        out = linear_head_loss(
            case["hidden"], weight, case["labels"], objective=registry.get("dft"),
            mask=case["mask"], row_filter=chosen,
        )  # fmt: skip
        out.loss.sum().backward()
        weights.append(weight.grad)
    assert 0.0 < row_filter.take() < 1.0
    assert norm_error(weights[1], weights[0]) <= 5e-2


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def a_head_does_not_wait_for_the_gpu() -> None:
    """Every objective that has all it needs, with the mask in host memory, as the step has it."""
    case = head_case(torch.bfloat16)
    mask, segments = case["mask"].cpu(), torch.arange(512, device="cuda") // 9
    log_ref = torch.full((512,), -1.0, device="cuda")
    for name in PARAMETERS:
        objective = registry.get(name.split("/")[0], **PARAMETERS[name])
        stats = data_stats(segments, log_ref) | {"num_segments": 57}
        more = {}
        if "kl" in objective.needs:
            near = case["weight"] * 1.01
            more = {"reference_hidden": case["hidden"].clone(), "reference_weight": near}
        for turn in range(2):  # the first call compiles
            hidden, weight = (case[n].clone().requires_grad_() for n in ("hidden", "weight"))
            with waiting_is_an_error() if turn else contextlib.nullcontext():
                out = linear_head_loss(
                    hidden, weight, case["labels"], objective=objective, mask=mask, stats=stats,
                    **more,
                )  # fmt: skip
                out.loss.sum().backward()
        assert hidden.grad.any() and weight.grad.any(), name


def a_loss_from_logits_does_not_wait_for_the_gpu() -> None:
    case = logits_case(131_072, torch.bfloat16)
    logits = case["logits"].requires_grad_()
    objective = registry.get("dft")
    for _ in range(2):  # the first call compiles
        with waiting_is_an_error():
            loss, _ = vocab_parallel_loss(logits, case["target"], None, objective)
            loss.sum().backward()
    assert logits.grad.any()


CHECKS: dict[str, Callable[[], None]] = {
    **{f"every objective from logits, {v}, {d}": partial(every_objective_from_logits, v, d)
       for v in VOCABULARIES for d in DTYPES},
    **{f"statistics, {v}": partial(statistics_top_k_and_ties, v) for v in VOCABULARIES},
    **{f"head, {name}, {d}": partial(the_head_and_its_memory, d, memory)
       for d in (torch.float32, torch.bfloat16)
       for name, memory in (("kept", 64 * MIB), ("recomputed", 3 * MIB))},
    "dW in main_grad": dw_in_main_grad_over_two_micro_batches_and_two_uses,
    "row filter": the_row_filter_changes_the_gradient_within_its_bound,
    "no waiting, head": a_head_does_not_wait_for_the_gpu,
    "no waiting, logits": a_loss_from_logits_does_not_wait_for_the_gpu,
}  # fmt: skip


def main() -> int:
    """Each check's name, and its traceback where it does not hold."""
    red = []
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            red.append(name)
            traceback.print_exc()
        print(f"{name}: {'FAILED' if name in red else 'ok'}", flush=True)
    print(f"{len(CHECKS)} checks of the kernels, failed: {red or 'none'}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
