"""Flags of the reference scores: their refusals, and what a scoring run leaves out of training's.

The same command line serves both runs, so that its layout and data need not be written twice.
"""

import argparse
from typing import Any

from megatron_dft.data.reference_scores import FLAG, ReferenceScores
from megatron_dft.flags import evaluation
from megatron_dft.flags.objective import has_virtual_stages, needs_distribution
from megatron_dft.losses.registry import Objective

# What a scoring run has no use for: it takes no step, saves no checkpoint and writes no log files.
_NOT_IN_SCORING: dict[str, Any] = {
    "skip_train": True,
    "finetune": True,
    "no_load_optim": True,
    "no_load_rng": True,
    "global_batch_size": None,
    "rampup_batch_size": None,
    "use_distributed_optimizer": False,
    "overlap_param_gather": False,
    "overlap_grad_reduce": False,
    "kl_coeff": 0.0,
    "dft_full_weight": "none",
    "loss_normalizer": "tokens",
    "kl_target": None,
    "l2sp_coeff": 0.0,
    "relative_norm_target": None,
    "log_drift_interval": None,
    "eval_iters": 0,
    "save": None,
    "save_interval": None,
    "save_hf": None,
    "save_hf_interval": None,
    "keep_last": None,
    "async_save": False,
    "tensorboard_dir": None,
    "wandb_project": "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag that a training run reads and a scoring run writes."""
    parser.add_argument_group("reference scores").add_argument(
        FLAG,
        metavar="DIR",
        help="log-probabilities of the reference for iw-sft, psft, dpo and --dft-weight-from "
        "reference, written by megatron_dft.score: read beside the data, no frozen model is held",
    )


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that a scoring run alone has."""
    parser.add_argument_group("scoring").add_argument(
        "--score-segment-tokens",
        type=int,
        default=2**20,
        metavar="TOKENS",
        help="store the scores after each of these; a killed run goes on behind the last; "
        "default: %(default)s",
    )


def leave_out_training(args: argparse.Namespace) -> None:
    """Undo the flags that mean nothing in a scoring run; changes `args`."""
    for dest, value in _NOT_IN_SCORING.items():
        assert hasattr(args, dest), dest
        setattr(args, dest, value)


def check_scoring(args: argparse.Namespace) -> None:
    """Raise ValueError in one line for what a scoring run cannot do."""
    if args.dft_reference_scores is None:
        raise ValueError(f"{FLAG}: expected a directory to write the scores to, got none")
    if not args.train_data:
        raise ValueError("--train-data: expected at least one file of conversations, got none")
    if args.dft_reference_model is not None:
        raise ValueError(
            "--dft-reference-model: is the frozen model of a training run; a scoring run scores "
            "--hf-model, or the checkpoint of --load: give the reference there"
        )
    if args.score_segment_tokens < 1:
        raise ValueError(
            f"--score-segment-tokens: expected at least 1, got {args.score_segment_tokens}"
        )
    if has_virtual_stages(args):
        raise ValueError(
            "--num-layers-per-virtual-pipeline-stage: scoring has been proven without virtual "
            "stages alone; drop it and its like, the scores serve every layout"
        )
    if args.mtp_num_layers:
        raise ValueError("--mtp-num-layers: scoring has not been proven with it; drop the flag")


def check_training(args: argparse.Namespace, objective: Objective) -> None:
    """Raise ValueError in one line where --dft-reference-scores does not fit the other flags."""
    if args.dft_reference_scores is None:
        return
    if args.dft_reference_model is not None:
        raise ValueError(
            f"{FLAG}: takes the place of --dft-reference-model {args.dft_reference_model}; drop "
            "one of the two"
        )
    if needs_distribution(args, objective):
        flag = "--kl-coeff" if args.kl_coeff else f"--loss {objective.name}"
        if objective.wants_mass:
            flag = f"--dft-weight-from {objective.weight_from}"
        raise ValueError(
            f"{FLAG}: holds the target token's probability alone, {flag} needs the reference's "
            "whole distribution; drop it, the frozen model is held then"
        )
    if "reference_log_prob" not in objective.needs:
        raise ValueError(
            f"{FLAG}: --loss {objective.name} compares with nothing; drop it, or choose iw-sft, "
            "psft, dpo or --dft-weight-from reference"
        )
    if objective.entry.per_pair and (flag := evaluation.data_flag(args)) is not None:
        raise ValueError(
            f"{FLAG}: holds scores of the training pairs alone, {flag} needs the reference of its "
            "own; drop one of the two, without scores a frozen model is held"
        )
    ReferenceScores(args.dft_reference_scores)
