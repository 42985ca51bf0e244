"""Every objective's loss and gradients on the GPU, by both routes, in fp32: against the formulas in
float64 on the CPU.

`python -m tests.gpu.values [--device cpu]`; status 0 only if each is within BOUND.
"""

import argparse
import sys

import torch
from torch import Tensor

from megatron_dft.losses import registry
from megatron_dft.losses.linear_head import linear_head_loss
from megatron_dft.losses.vocab_parallel import vocab_parallel_loss
from tests.losses.reference import PARAMETERS, data_stats, dense_loss

# A logit of size 16, the sum of 64 fp32 products, is off by about √64 · 16 · 2⁻²⁴ · ½ = 4e-6, and
# log p, p and the weight by as much; the norm over tokens averages it.
BOUND = 1e-5
TOKENS, HIDDEN, VOCABULARY = 47, 64, 1003


def case(seed: int = 5) -> dict[str, Tensor]:
    """Hidden states whose tokens are likely or not, two output weights, conversations; float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    weight = normal(VOCABULARY, HIDDEN) * 2 / HIDDEN**0.5
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    towards = torch.rand(TOKENS, 1, generator=draw, dtype=torch.float64) * 2
    exact = {
        "hidden": normal(TOKENS, HIDDEN) + towards * weight[labels],
        "weight": weight,
        "reference_weight": weight + 0.3 * normal(VOCABULARY, HIDDEN) / HIDDEN**0.5,
        "upstream": normal(TOKENS),
    }
    # What fp32 keeps: the input is the same number on both sides.
    exact = {name: value.float().double() for name, value in exact.items()}
    mask = torch.rand(TOKENS, generator=draw) < 0.7
    return exact | {"labels": labels, "mask": mask, "segments": torch.arange(TOKENS) // 6}


def expected(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """loss, d logits, d hidden and dW by autograd of the formula, float64."""
    hidden, weight = (given[n].clone().requires_grad_() for n in ("hidden", "weight"))
    logits = hidden @ weight.t()
    logits.retain_grad()
    reference = given["hidden"] @ given["reference_weight"].t()
    loss, _ = dense_loss(name, logits, given["labels"], given["mask"], given["segments"], reference)
    loss.backward(given["upstream"])
    return {"loss": loss.detach(), "logits": logits.grad, "hidden": hidden.grad,
            "weight": weight.grad}  # fmt: skip


def _stats(given: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    log_ref = (given["hidden"] @ given["reference_weight"].t()).log_softmax(-1)
    log_ref = log_ref.gather(1, given["labels"][:, None]).squeeze(1)
    return data_stats(given["segments"].to(device), log_ref.float().to(device))


def from_logits(name: str, given: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The loss of fp32 logits."""
    objective = registry.get(name.split("/")[0], **PARAMETERS[name])
    logits = (given["hidden"] @ given["weight"].t()).float().to(device).requires_grad_()
    target = torch.where(given["mask"], given["labels"], -100).to(device)
    more = {}
    if "kl" in objective.needs:
        reference = given["hidden"] @ given["reference_weight"].t()
        more["reference_logits"] = reference.float().to(device)
    loss, _ = vocab_parallel_loss(
        logits * 1.0, target, None, objective, token_stats=_stats(given, device), **more
    )
    loss.backward(given["upstream"].float().to(device))
    return {"loss": loss.detach(), "logits": logits.grad}


def from_hidden(name: str, given: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The loss of fp32 hidden states."""
    objective = registry.get(name.split("/")[0], **PARAMETERS[name])
    hidden, weight, reference = (
        given[n].float().to(device) for n in ("hidden", "weight", "reference_weight")
    )
    more = {}
    if "kl" in objective.needs:
        more = {"reference_hidden": hidden.clone(), "reference_weight": reference}
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_head_loss(
        hidden, weight, given["labels"].to(device), objective=objective,
        mask=given["mask"].to(device), stats=_stats(given, device), **more,
    )  # fmt: skip
    out.loss.backward(given["upstream"].float().to(device))
    return {"loss": out.loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def errors(device: str) -> dict[str, dict[str, float]]:
    """route → objective, what → ‖found − expected‖ / ‖expected‖."""
    given, found = case(), {"logits": {}, "head": {}}
    for name in PARAMETERS:
        want = expected(name, given)
        for route, way in (("logits", from_logits), ("head", from_hidden)):
            for what, value in way(name, given, device).items():
                off = (value.double().cpu() - want[what]).norm() / want[what].norm()
                found[route][f"{name}: {what}"] = float(off)
    return found


def main() -> int:
    """One line a route."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    red = 0
    for route, found in errors(parser.parse_args().device).items():
        bad = {what: error for what, error in found.items() if not error <= BOUND}
        red += len(bad)
        print(f"{route}: {len(PARAMETERS)} objectives, error at most {max(found.values()):.1e}; "
              f"red: {bad or 'none'}")  # fmt: skip
    print(f"{len(PARAMETERS)} objectives by two routes: {red} values or gradients are red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
