"""Flags of the loss: the objective and its parameters, its reach, and what it is compared with."""

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_dft.data.spec import KIND_END, KIND_WRITTEN
from megatron_dft.losses import registry
from megatron_dft.losses.refusals import flag_of
from megatron_dft.losses.registry import Objective
from megatron_dft.losses.token_stats import (
    REFERENCE_STATISTICS,
    ROW_STATISTICS,
    VOCABULARY_STATISTICS,
)

# The kinds of tokens (bits of the rows' token_kinds) that take weight 1.
FULL_WEIGHT = {"none": 0, "end": KIND_END, "template": KIND_WRITTEN | KIND_END}

NORMALIZERS = ("tokens", "weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--loss with every objective's parameters, its reach and the reference."""
    registry.add_arguments(parser.add_argument_group("objective"))
    group = parser.add_argument_group("reach and reference of the loss")
    group.add_argument(
        "--dft-mtp",
        action="store_true",
        help="let the objective weigh the losses of multi-token prediction heads too; they start "
        "from random weights and are not exported",
    )
    group.add_argument(
        "--dft-full-weight",
        choices=list(FULL_WEIGHT),
        default="none",
        help="tokens that take weight 1 under any --loss: those that end a trained turn (end), or "
        "all that the chat template writes into it (template). DFT weighs an end that the model "
        "finds unlikely by that low probability, and may never learn to stop; default: none, the "
        "paper's method",
    )
    group.add_argument(
        "--loss-normalizer",
        choices=NORMALIZERS,
        default="tokens",
        help="what the sum of a step's token losses is divided by: the number of supervised tokens "
        "of the global batch, or the sum of their weights in the data, so that the weights are "
        "shares and no change of the learning rate; the same without weights; default: %(default)s",
    )
    group.add_argument(
        "--dft-reference-model",
        metavar="DIR_OR_NAME",
        help="frozen model for iw-sft, psft, asft, dpo, target-sft (its teacher), --kl-coeff and "
        "--dft-weight-from reference, held in the same layout; default: --hf-model",
    )
    group.add_argument(
        "--kl-coeff",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="add LAMBDA · KL(reference ‖ model) over the vocabulary to any objective's token loss",
    )


def line(argv: Sequence[str], objective: Objective) -> str:
    """What a run is trained on, and whether somebody chose it."""
    name = objective.name
    values = "".join(f", {key} {value}" for key, value in objective.values.items())
    said = f"loss: {name} ({registry.OBJECTIVES[name].source}{values})"
    if any(word.split("=")[0] == "--loss" for word in argv):
        return said
    return f"{said}, the default; --loss sft is plain cross entropy"


def compares(args: argparse.Namespace, objective: Objective) -> bool:
    """Whether the loss looks at a reference model, held or scored before."""
    return bool(args.kl_coeff) or bool(REFERENCE_STATISTICS & objective.needs)


def needs_kl(args: argparse.Namespace, objective: Objective) -> bool:
    """Whether the loss looks at the reference's whole distribution."""
    return bool(args.kl_coeff) or "kl" in objective.needs


def needs_distribution(args: argparse.Namespace, objective: Objective) -> bool:
    """Whether the log-probabilities that a scoring run stores do not serve."""
    return needs_kl(args, objective) or objective.wants_mass


def check(args: argparse.Namespace, objective: Objective) -> None:
    """Raise one ValueError for what the objective or its reference cannot do."""
    known = frozenset(VOCABULARY_STATISTICS) | REFERENCE_STATISTICS | ROW_STATISTICS
    assert objective.needs <= known, f"no source for {sorted(objective.needs - known)}"
    if objective.signed:
        _check_signed(args, objective)
    _check_full_weight(args, objective)
    _check_reference(args, objective)
    _check_mtp(args, objective)


def _check_signed(args: argparse.Namespace, objective: Objective) -> None:
    """Refusals of objectives that push tokens down as well as up."""
    loss = f"--loss {objective.name}"
    if args.dft_full_weight != "none":
        raise ValueError(
            f"--dft-full-weight {args.dft_full_weight}: would teach the ends of bad answers too, "
            f"got {loss}; drop it"
        )
    if args.loss_row_filter is not None:
        raise ValueError(f"--loss-row-filter: has not been proven with {loss}; drop it")
    if args.loss_normalizer == "weights":
        raise ValueError(
            f"--loss-normalizer weights: rewards and pairs have no sum of weights, got {loss}; "
            "drop it"
        )
    if not objective.entry.per_pair:
        return
    if args.kl_coeff:
        raise ValueError(
            f"--kl-coeff: has not been proven with {loss}, whose β holds the model to the base "
            "already; drop it"
        )
    if args.num_experts:
        raise ValueError(
            f"{loss}: has not been proven with experts, whose routers' losses are divided by "
            "tokens; choose another --loss"
        )


def _check_full_weight(args: argparse.Namespace, objective: Objective) -> None:
    flag = f"--dft-full-weight {args.dft_full_weight}"
    if args.dft_full_weight == "none":
        return
    if objective.name == "sft":
        raise ValueError(f"{flag}: --loss sft gives every token weight 1 already; drop the flag")
    if args.dft_mtp:
        raise ValueError(
            f"{flag}: has not been proven with --dft-mtp, whose heads predict later tokens; drop "
            "one of the two"
        )


def _check_reference(args: argparse.Namespace, objective: Objective) -> None:
    if args.kl_coeff < 0:
        raise ValueError(
            f"--kl-coeff: expected at least 0, got {args.kl_coeff}; leave it out for none"
        )
    if args.kl_coeff and "kl" in objective.needs:
        raise ValueError(
            f"--kl-coeff: --loss {objective.name} has the KL term already; use its own flag"
        )
    if args.dft_reference_model is not None and not compares(args, objective):
        raise ValueError(
            f"--dft-reference-model: --loss {objective.name} compares with nothing; drop it, or "
            "choose iw-sft, psft, asft, target-sft, dpo, --kl-coeff or --dft-weight-from reference"
        )
    held = compares(args, objective) and args.dft_reference_scores is None
    if held and has_virtual_stages(args):
        raise ValueError(
            f"--loss {objective.name}: a reference model has not been proven under virtual "
            "pipeline stages; drop --num-layers-per-virtual-pipeline-stage and its like, or give "
            "--dft-reference-scores"
        )


def _check_mtp(args: argparse.Namespace, objective: Objective) -> None:
    if not args.mtp_num_layers:
        if args.dft_mtp:
            raise ValueError(
                "--dft-mtp: expected --mtp-num-layers beside it, got none; give it or drop the flag"
            )
        return
    for dest in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(args, dest) > 1:
            raise ValueError(
                f"{flag_of(dest)}: with --mtp-num-layers only 1 has been proven, "
                f"got {getattr(args, dest)}; drop one of the two"
            )
    if compares(args, objective):
        raise ValueError(
            "--mtp-num-layers: has not been proven with a reference model; drop the flag"
        )
    if args.dft_mtp and (objective.needs or not objective.per_token):
        raise ValueError(
            f"--dft-mtp: expected an objective that looks at p of single tokens, got --loss "
            f"{objective.name}; drop the flag to weigh the main head alone"
        )


def has_virtual_stages(args: Any) -> bool:
    """Whether the flags cut a rank's pipeline stage into several."""
    return any(
        value is not None
        for value in (
            args.num_layers_per_virtual_pipeline_stage,
            args.num_virtual_stages_per_pipeline_rank,
            args.pipeline_model_parallel_layout,
        )
    )
