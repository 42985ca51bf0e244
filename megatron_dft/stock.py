"""--loss in the stock pretrain_gpt.py of a Megatron-LM checkout (0.16 to main): what patches/ adds.

    megatron-dft patch --megatron-lm DIR      # three lines in DIR/pretrain_gpt.py
    torchrun ... DIR/pretrain_gpt.py --loss dft <Megatron's flags>

The script imports two functions: `with_loss_flags` puts --loss and every --dft-* flag into
Megatron's parser, and the decorator `weighted_loss` hands Megatron's own loss_func the objective's
token losses in place of the cross entropy. Sums, token count, NaN checks, normalisation and
schedules stay Megatron's. Without --loss, and in evaluation, the script is as it was.

Megatron's cross entropy is reduced over the vocabulary shards already, so p = exp(−CE) on every
rank without a collective. What would make that untrue is refused when the flags are parsed.

This module imports torch, megatron_dft.losses and Megatron's get_args alone: it has to load beside
releases that lack what the rest of the package needs.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_dft.losses import registry
from megatron_dft.losses.refusals import NOT_P, Refusal, refuse, refuse_foreign_cross_entropy
from megatron_dft.losses.registry import Objective
from megatron_dft.losses.report import CROSS_ENTROPY, loss_report
from megatron_dft.losses.token_stats import TokenStats

# (loss, int32 token count, name → [sum, count]): the contract of Megatron's schedules.
LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]

# What the stock script alone cannot do, beside the settings under which exp(−CE) is not p.
_REFUSED: dict[str, Refusal] = {
    **NOT_P,
    "export_kd_teacher_load": Refusal(bool, "replaces the loss by distillation"),
    "modelopt_enabled": Refusal(bool, "takes ModelOpt's loss function"),
    "use_legacy_models": Refusal(bool, "takes a model whose loss has not been proven here"),
}


def check(args: argparse.Namespace) -> Objective:
    """The objective that the flags ask for.

    Raises:
        ValueError: one line; a parameter is out of range or another objective's, or the stock loss
            function cannot give this objective what it needs under these settings.
    """
    objective = registry.resolve(args)
    if objective.name == "sft":
        return objective
    loss = f"--loss {objective.name}"
    refuse(args, _REFUSED, loss)
    refuse_foreign_cross_entropy(args, loss)
    if objective.needs:
        raise ValueError(
            f"{loss}: needs {', '.join(sorted(objective.needs))} of every token, which the stock "
            "loss function does not see; choose an objective of p alone or use megatron_dft.train"
        )
    if objective.per_conversation:
        raise ValueError(
            f"{loss}: weighs by conversation, whose borders the stock loss function does not see; "
            "choose a token-level objective or use megatron_dft.train"
        )
    split = getattr(args, "context_parallel_size", 1)
    if split > 1 and objective.entry.per_batch:
        raise ValueError(
            f"--context-parallel-size: {loss} takes a median of whole rows, expected 1 in the "
            f"stock script, got {split}; use megatron_dft.train"
        )
    if split > 1 and not getattr(args, "calculate_per_token_loss", False):
        raise ValueError(
            f"--context-parallel-size {split}: divides each part of a row by its own token count, "
            f"expected --calculate-per-token-loss beside {loss}, got none; add it"
        )
    return objective


def add_loss_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An extra_args_provider: --loss (default sft, which changes nothing) and its parameters.

    The command line is parsed here once, to refuse before a model is built what `check` refuses.
    """
    registry.add_arguments(parser.add_argument_group("megatron_dft"), default="sft")
    objective = check(parser.parse_known_args()[0])
    if objective.name != "sft" and os.environ.get("RANK", "0") == "0":
        values = "".join(f", {name} {value}" for name, value in objective.settings.items())
        source = objective.entry.source
        print(f"> megatron_dft: training loss {objective.name}{values} ({source})", flush=True)
    return parser


def with_loss_flags(parse: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes an `extra_args_provider=`, with our flags added to what that adds.

    It is `parse_and_validate_args` since 0.18, and `pretrain` itself before.
    """

    @functools.wraps(parse)
    def parse_with_loss(*args: Any, extra_args_provider: Any = None, **kwargs: Any) -> Any:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            if extra_args_provider is not None:
                parser = extra_args_provider(parser)
            return add_loss_flags(parser)

        return parse(*args, extra_args_provider=provider, **kwargs)

    return parse_with_loss


# The last arguments seen and their objective: checked again once, as Megatron changes them when it
# reads a checkpoint, and not in every micro-batch.
_checked: tuple[Any, Objective] | None = None


def _objective() -> Objective | None:
    """The objective of this process's arguments; None for the plain cross entropy."""
    global _checked
    args = get_args()
    # Scripts that import pretrain_gpt.loss_func (pretrain_vlm.py) have no --loss.
    if getattr(args, "loss", "sft") == "sft":
        return None
    if _checked is None or _checked[0] is not args:
        _checked = args, check(args)
    return _checked[1]


_summed: set[Callable[..., LossResult]] = set()  # loss functions seen to return the sum


def _check_sum(
    loss: Tensor, num_tokens: Tensor, expected: Tensor, loss_func: Callable[..., LossResult]
) -> None:
    """Once a loss function: it returned the sum over tokens, and their number.

    A fork's may do more to the cross entropy than sum it, and would do it to the token loss.
    `expected`: float32 [2], Σ mask · token loss and Σ mask. Raises ValueError.
    """
    if loss_func in _summed:
        return
    total, count = (float(value) for value in expected)
    got = float(loss.detach()), int(num_tokens)
    if abs(got[0] - total) > 1e-3 * abs(total) + 1e-6 or got[1] != round(count):
        raise ValueError(
            f"--loss: {loss_func.__name__} of this script was expected to return the sum of the "
            f"tokens' losses and their number, {total:.6g} and {count:.0f}, got {got[0]:.6g} and "
            f"{got[1]}; take its own weighting out, or use megatron_dft.train"
        )
    _summed.add(loss_func)


def weighted_loss(loss_func: Callable[..., LossResult]) -> Callable[..., LossResult]:
    """Megatron's loss_func(loss_mask, output_tensor, model=None), training on --loss.

    loss_mask, output_tensor: [b, s/cp] per rank, the mask (0 or 1) and the plain cross entropy of
    each token; neither is changed. In the report 'lm loss' stays the plain cross entropy; beside it
    stand '<objective> loss', 'dft/mean-prob', 'dft/mean-weight' and the histogram of p.
    """

    @functools.wraps(loss_func)
    def weighted(loss_mask: Tensor, output_tensor: Tensor, model: Any = None) -> LossResult:
        objective = _objective()
        training = torch.is_grad_enabled() if model is None else model.training
        if objective is None or not training:
            return loss_func(loss_mask, output_tensor, model=model)
        cross_entropy = output_tensor.float()
        mask = loss_mask.view_as(cross_entropy)
        token_loss, weight = objective(TokenStats(log_prob=-cross_entropy, mask=mask))
        loss, num_tokens, report = loss_func(loss_mask, token_loss, model=model)
        ours = loss_report(objective.name, cross_entropy, token_loss, weight, mask, correct=None)
        _check_sum(loss, num_tokens, ours[f"{objective.name} loss"], loss_func)
        assert CROSS_ENTROPY in report, f"Megatron's report has no {CROSS_ENTROPY!r}: {report}"
        return loss, num_tokens, report | ours

    return weighted
