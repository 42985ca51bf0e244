"""Megatron's own settings that a run here refuses, beside those under which exp(−CE) is not p."""

import argparse
from typing import Any

from megatron_dft.hf.layout import check_layout
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.losses.refusals import (
    NOT_P,
    Refusal,
    given,
    refuse,
    refuse_foreign_cross_entropy,
)
from megatron_dft.losses.registry import Objective

_REFUSED: dict[str, Refusal] = {
    **NOT_P,
    "hybrid_layer_pattern": Refusal(
        given, "hybrid models have not been proven here", "use a GPT model"
    ),
    "sft": Refusal(bool, "is Megatron's own SFT data set, which --train-data replaces"),
    "use_checkpoint_args": Refusal(
        bool, "takes the model's flags from the checkpoint, --hf-model sets them"
    ),
    "cuda_graph_impl": Refusal(
        lambda value: value not in (None, "none"),
        "replays a layer with the numbers that it was captured with, which of packed rows are the "
        "longest conversation and how many there are (transformer_engine's takes no packed row), "
        "and no graph of this loop has been captured",
        "use --cuda-graph-impl none",
    ),
    "perform_rl_step": Refusal(bool, "is for reinforcement learning", "use stock Megatron-LM"),
    "use_torch_fsdp2": Refusal(bool, "has not been proven here", "use --use-distributed-optimizer"),
    "use_megatron_fsdp": Refusal(
        bool,
        "shards parameters as DTensors, which no torch_dist checkpoint holds and no export to "
        "Hugging Face gathers",
        "use --use-distributed-optimizer",
    ),
    "transformer_impl": Refusal(
        lambda value: value == "inference_optimized", "is for inference", "drop the flag"
    ),
    "moe_router_load_balancing_type": Refusal(
        lambda value: "quantile_balancing" in (value or ()),
        "quantile_balancing counts padding as tokens",
        "choose aux_loss",
    ),
    "fp8_param_gather": Refusal(
        bool,
        "takes the optimizer's fp32 weights from before Hugging Face's are read "
        "(get_high_precision_init_val), which are uninitialised memory",
    ),
    "fp8_output_proj": Refusal(
        bool, "computes the logits in a layer that has not been proven here"
    ),
    "defer_embedding_wgrad_compute": Refusal(
        bool, "keeps activations of the output layer, which evaluation and frozen models fill too"
    ),
    "dataloader_inter_document_masking": Refusal(bool, "is decided by --train-data"),
    "phase_transition_iterations": Refusal(given, "has not been proven here"),
}


def has_router_loss(args: Any) -> bool:
    """Whether the flags give a router's losses (load balancing, z) a weight."""
    coefficients = args.moe_aux_loss_coeff
    if not isinstance(coefficients, list | tuple):
        coefficients = [coefficients]
    return any(coefficients) or args.moe_z_loss_coeff is not None


def refuse_settings(args: argparse.Namespace, objective: Objective) -> None:
    """Raise one ValueError for a setting that is refused; args not yet validated by Megatron."""
    loss = f"--loss {objective.name}"
    refuse(args, _REFUSED, loss)
    refuse_foreign_cross_entropy(args, loss)


def refuse_layout(args: argparse.Namespace, checkpoint: HFCheckpoint) -> None:
    """Raise one ValueError for a layout that the model's shape cannot take."""
    check_layout(
        checkpoint,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        expert_parallel=args.expert_model_parallel_size,
    )
