"""Every refusal of a user's settings, before a model is built or a file written.

Each is one ValueError line: the flag, what was expected, what came, the remedy.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_dft.batch_checks import check_batch, check_run_length
from megatron_dft.hf.config import TRAINING_DEFAULTS, megatron_args
from megatron_dft.hf.layout import check_layout
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.logits_probe import VOCABULARY_STATISTICS
from megatron_dft.losses.registry import Objective

# Settings under which exp(−CE) is not the probability of the target token, or under which the loss
# takes a way that has not been proven here. dest → (is it refused?, why and what to do).
_REFUSED: dict[str, tuple[Any, str]] = {
    "fp16_lm_cross_entropy": (
        True,
        "computes the cross entropy in fp16, where exp(-CE) is not p; drop the flag",
    ),
    "logits_load_dir": ("given", "replaces the loss by distillation; drop it or use --loss sft"),
    "logits_save_dir": ("given", "is for distillation teachers; run it with stock Megatron-LM"),
    "hybrid_layer_pattern": ("given", "hybrid models have not been proven here; use a GPT model"),
    "overlap_moe_expert_parallel_comm": (
        True,
        "takes a schedule that bypasses the model's loss; drop the flag",
    ),
    "use_mup": (True, "scales the logits after the output layer; drop the flag"),
    "sft": (True, "is Megatron's own SFT data set; --train-data replaces it, drop the flag"),
    "use_checkpoint_args": (
        True,
        "takes the model's flags from the checkpoint; --hf-model sets them",
    ),
    "yaml_cfg": ("given", "bypasses the flags; give them on the command line"),
    "hybrid_context_parallel": (True, "has not been proven here; use --context-parallel-size"),
    "cuda_graph_impl": ("not none", "has not been proven here; use --cuda-graph-impl none"),
    "perform_rl_step": (True, "is for reinforcement learning; use stock Megatron-LM"),
    "use_torch_fsdp2": (True, "has not been proven here; use --use-distributed-optimizer"),
    "use_megatron_fsdp": (True, "has not been proven here; use --use-distributed-optimizer"),
    "dataloader_inter_document_masking": (True, "is decided by --train-data; drop the flag"),
    "phase_transition_iterations": ("given", "has not been proven here; drop it"),
}


def _is_refused(value: Any, rule: Any) -> bool:
    if rule is True:
        return value is True
    if rule == "not none":
        return value not in (None, "none")
    return value is not None


def flag_of(dest: str) -> str:
    """The usual spelling of an argparse dest."""
    return "--" + dest.replace("_", "-")


def no_contradiction(
    parser: argparse.ArgumentParser, given: dict[str, Any], model: dict[str, Any], source: str
) -> None:
    """Raise ValueError if a given flag contradicts the model's config (given: flags as typed)."""
    flags = {action.dest: action.option_strings[-1] for action in parser._actions}
    for dest, expected in model.items():
        if dest in TRAINING_DEFAULTS:
            continue  # about training, not the architecture: a given flag wins
        if dest in given and given[dest] != expected:
            raise ValueError(
                f"{flags[dest]}: {source}/config.json says {expected}, got {given[dest]}; "
                "leave the flag out, the config sets it"
            )


def check(
    args: argparse.Namespace,
    world_size: int,
    checkpoint: HFCheckpoint | None,
    objective: Objective,
) -> None:
    """Every refusal; `args` are parsed, not yet validated by Megatron."""
    for dest, (rule, why) in _REFUSED.items():
        if _is_refused(getattr(args, dest, None), rule):
            raise ValueError(f"{flag_of(dest)}: {why}")
    if args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl != "native":
        raise ValueError(
            "--cross-entropy-fusion-impl: expected native (te is not proven to give p under a "
            f"weighted loss), got {args.cross_entropy_fusion_impl}"
        )
    _check_objective(args, objective)
    _check_sources(args, checkpoint)
    check_run_length(args)
    check_batch(args, world_size)
    _check_output(args, checkpoint)
    if checkpoint is not None:
        check_layout(
            checkpoint,
            tensor_parallel=args.tensor_model_parallel_size,
            pipeline_parallel=args.pipeline_model_parallel_size,
            expert_parallel=args.expert_model_parallel_size,
        )


# Fields of TokenStats that come from a frozen reference model.
REFERENCE_STATISTICS = frozenset(("reference_log_prob", "kl"))


def same_architecture(checkpoint: HFCheckpoint, reference: HFCheckpoint) -> None:
    """Raise ValueError unless the reference is built by the very flags of the trained model."""
    mine, theirs = megatron_args(checkpoint), megatron_args(reference)
    for dest in sorted(mine.keys() | theirs.keys()):
        if mine.get(dest) != theirs.get(dest):
            raise ValueError(
                f"--dft-reference-model: expected {flag_of(dest)} {mine.get(dest)} as in "
                f"{checkpoint.name}, got {theirs.get(dest)} in {reference.name}"
            )


def _check_objective(args: argparse.Namespace, objective: Objective) -> None:
    missing = sorted(objective.needs - set(VOCABULARY_STATISTICS) - REFERENCE_STATISTICS)
    assert not missing, f"no source for {missing}"
    compares = bool(args.kl_coeff) or bool(REFERENCE_STATISTICS & objective.needs)
    if args.kl_coeff < 0:
        raise ValueError(f"--kl-coeff: expected at least 0, got {args.kl_coeff}")
    if args.kl_coeff and "kl" in objective.needs:
        raise ValueError(
            f"--kl-coeff: --loss {objective.name} has the KL term already; use its own flag"
        )
    if args.dft_reference_model is not None and not compares:
        raise ValueError(
            f"--dft-reference-model: --loss {objective.name} compares with nothing; drop it, or "
            "choose iw-sft, psft, asft or --kl-coeff"
        )
    _check_mtp(args, objective, compares)
    if compares and args.dft_reference_scores is None and has_virtual_stages(args):
        raise ValueError(
            f"--loss {objective.name}: a reference model has not been proven under virtual "
            "pipeline stages; drop --num-layers-per-virtual-pipeline-stage and its like, or give "
            "--dft-reference-scores"
        )
    if args.loss_chunk_size is not None and (args.kl_coeff or "kl" in objective.needs):
        raise ValueError(
            "--loss-chunk-size: the KL needs the whole distribution at once; drop the flag"
        )
    if args.loss_chunk_size is None:
        return
    if args.loss_chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {args.loss_chunk_size}; "
            "256 is a good start, leave it out for Megatron's own cross entropy"
        )
    if args.overlap_param_gather:
        raise ValueError(
            "--loss-chunk-size: reads the output layer's weight without calling the layer, which "
            "--overlap-param-gather does not see; drop one of the two"
        )
    if args.cross_entropy_loss_fusion:
        raise ValueError(
            "--cross-entropy-loss-fusion: has no effect under --loss-chunk-size; drop one of them"
        )


def _check_mtp(args: argparse.Namespace, objective: Objective, compares: bool) -> None:
    if not args.mtp_num_layers:
        if args.dft_mtp:
            raise ValueError("--dft-mtp: expected --mtp-num-layers beside it, got none")
        return
    for dest in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(args, dest) > 1:
            raise ValueError(
                f"{flag_of(dest)}: with --mtp-num-layers only 1 has been proven, "
                f"got {getattr(args, dest)}; drop one of the two"
            )
    if compares:
        raise ValueError(
            "--mtp-num-layers: has not been proven with a reference model; drop the flag"
        )
    if args.dft_mtp and (objective.needs or not objective.per_token):
        raise ValueError(
            f"--dft-mtp: expected an objective that looks at p of single tokens, got --loss "
            f"{objective.name}; drop the flag to weigh the main head alone"
        )


def has_virtual_stages(args: argparse.Namespace) -> bool:
    """Whether the flags cut a rank's pipeline stage into several."""
    return any(
        value is not None
        for value in (
            args.num_layers_per_virtual_pipeline_stage,
            args.num_virtual_stages_per_pipeline_rank,
            args.pipeline_model_parallel_layout,
        )
    )


def _check_sources(args: argparse.Namespace, checkpoint: HFCheckpoint | None) -> None:
    if checkpoint is None:
        raise ValueError(
            "--hf-model: expected a Hugging Face checkpoint to start from, got none; give a "
            "directory or a hub name"
        )
    if not args.train_data and not args.skip_train:
        raise ValueError("--train-data: expected at least one file of conversations, got none")
    if args.eval_iters and not args.valid_data and not args.valid_share:
        raise ValueError(
            f"--eval-iters {args.eval_iters}: needs --valid-data, "
            "got none; give it (or --valid-share) or drop the flag"
        )


def _check_targets(args: argparse.Namespace) -> None:
    for dest, coefficient in (("kl_target", "kl_coeff"), ("relative_norm_target", "l2sp_coeff")):
        target = getattr(args, dest)
        if target is None:
            continue
        if not 0 < target < float("inf"):
            raise ValueError(f"{flag_of(dest)}: expected a number above 0, got {target}")
        if not getattr(args, coefficient):
            raise ValueError(
                f"{flag_of(dest)}: expected {flag_of(coefficient)} above 0 to start from, got 0; "
                "give both"
            )


def _check_output(args: argparse.Namespace, checkpoint: HFCheckpoint | None) -> None:
    if args.save is not None and args.save_interval is None:
        raise ValueError(
            f"--save {args.save}: expected --save-interval STEPS beside it, got none; "
            "a number beyond the last step saves at the end alone"
        )
    if args.log_drift_interval is not None and args.log_drift_interval < 1:
        raise ValueError(
            f"--log-drift-interval: expected at least 1 step, got {args.log_drift_interval}"
        )
    if not 0 <= args.l2sp_coeff < float("inf"):
        raise ValueError(f"--l2sp-coeff: expected a number of 0 or more, got {args.l2sp_coeff}")
    _check_targets(args)
    if args.save_hf is None:
        if args.save_hf_interval is not None:
            raise ValueError("--save-hf-interval: expected --save-hf DIR beside it, got none")
        return
    if args.save_hf_interval is not None and args.save_hf_interval < 1:
        raise ValueError(
            f"--save-hf-interval: expected at least 1 step, got {args.save_hf_interval}"
        )
    target = Path(args.save_hf)
    if checkpoint is not None and target.resolve() == checkpoint.path.resolve():
        raise ValueError(f"--save-hf: {target} is the base model itself; choose another directory")
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise ValueError(
            f"--save-hf: {target} exists and is not empty; choose another directory or add "
            "--overwrite"
        )
