"""The flags of a training run beside Megatron's own; arguments.py says what they mean for a run."""

import argparse

from megatron_dft import fake_quantize
from megatron_dft.data import flags as data_flags
from megatron_dft.hf import bridge
from megatron_dft.losses import registry


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags; nothing is parsed or checked."""
    group = parser.add_argument_group("megatron_dft", "Dynamic fine-tuning and its family")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the GPUs where there are any and the CPU (gloo) where there are none",
    )
    group.add_argument(
        "--hf-model",
        metavar="DIR_OR_NAME",
        help="Hugging Face checkpoint (safetensors) to start from: a directory or a hub name; its "
        "config.json sets the model's flags",
    )
    bridge.add_argument(group)
    group.add_argument("--hf-revision", metavar="COMMIT", help="revision of a hub name")
    group.add_argument(
        "--save-hf", metavar="DIR", help="write a Hugging Face checkpoint here at the end"
    )
    group.add_argument(
        "--save-hf-interval",
        type=int,
        metavar="STEPS",
        help="also write DIR-step-N every so many steps",
    )
    group.add_argument(
        "--save-hf-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the written weights; default: that of the base checkpoint",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="let --save-hf replace an existing directory"
    )
    group.add_argument(
        "--progress",
        choices=("auto", "rich", "plain", "off"),
        default="auto",
        help="our progress line beside Megatron's log; auto is rich on a terminal, else plain",
    )
    group.add_argument(
        "--loss-chunk-size",
        type=int,
        metavar="TOKENS",
        help="compute the loss from the hidden states, never holding more than this many tokens' "
        "worth of logits; default: Megatron's own output layer and cross entropy",
    )
    group.add_argument(
        "--dft-mtp",
        action="store_true",
        help="let the objective weigh the losses of multi-token prediction heads too; they start "
        "from random weights and are not exported",
    )
    group.add_argument(
        "--dft-reference-model",
        metavar="DIR_OR_NAME",
        help="frozen model for iw-sft, psft, asft and --kl-coeff, held in the same layout; "
        "default: --hf-model",
    )
    group.add_argument(
        "--dft-reference-scores",
        metavar="DIR",
        help="log-probabilities of the reference for iw-sft and psft, written by "
        "megatron_dft.score: read beside the data, no frozen model is held",
    )
    group.add_argument(
        "--kl-coeff",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="add LAMBDA · KL(reference ‖ model) over the vocabulary to any objective's token loss",
    )
    group.add_argument(
        "--log-drift-interval",
        type=int,
        metavar="STEPS",
        help="log how far the weights are from --hf-model's every so many steps",
    )
    group.add_argument(
        "--l2sp-coeff",
        type=float,
        default=0.0,
        metavar="LAMBDA",
        help="pull the weights back to --hf-model's by lr · LAMBDA · (θ − θ₀) in each step "
        "(L2-SP, arXiv 1802.01483, decoupled from Adam's scaling)",
    )
    group.add_argument(
        "--kl-target",
        type=float,
        metavar="NATS",
        help="hold the mean KL(reference ‖ model) of the supervised tokens here by adapting "
        "--kl-coeff after each step, from the value given, by at most a factor of 100",
    )
    group.add_argument(
        "--relative-norm-target",
        type=float,
        metavar="SHARE",
        help="hold ‖θ − θ₀‖/‖θ₀‖ here by adapting --l2sp-coeff after each step, from the value "
        "given, by at most a factor of 100; measures the norm in every step",
    )
    fake_quantize.add_arguments(group)
    data_flags.add_arguments(parser.add_argument_group("data"))
    registry.add_arguments(parser.add_argument_group("objective"))
