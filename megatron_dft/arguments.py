"""Our flags beside Megatron's, and every check of a user's settings before anything is built.

`add_arguments` is the `extra_args_provider` of Megatron's parser. It parses the command line once
itself, so that it can tell the flags that were given from defaults: what the Hugging Face config
and the device decide becomes a default, and a given flag that contradicts them is an error.
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_dft import checks, compat, fake_quantize, score_checks, training_flags
from megatron_dft.cpu import runtime
from megatron_dft.gemma_checks import check_own_layers, same_own_layers
from megatron_dft.hf import bridge
from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.losses import registry
from megatron_dft.losses.registry import Objective

if TYPE_CHECKING:
    from megatron_dft.reference_model import ReferenceModel

# What the CPU lacks is switched off; the program is otherwise the same.
CPU_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
}

# Defaults of ours that differ from Megatron's; each holds only where the flag is not given.
TRAINING_DEFAULTS: dict[str, Any] = {
    # Every supervised token of the global batch weighs the same in any layout.
    "calculate_per_token_loss": True,
    "micro_batch_size": 1,
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 1000,
    "ckpt_format": "torch_dist",
    "tokenizer_type": "NullTokenizer",
    "split": "100,0,0",
    "create_attention_mask_in_dataloader": False,
    "check_for_nan_in_loss_and_grad": True,
    "num_workers": 0,
}


@dataclass
class Settings:
    """What the flags resolve to, for the rest of the program.

    `checkpoint` is None where the run starts from Megatron's own checkpoint alone.
    """

    objective: Objective
    checkpoint: HFCheckpoint | None
    vocab_size: int | None
    # The base that the run is compared with, and its frozen model once it is built (model.py).
    reference_checkpoint: HFCheckpoint | None = None
    reference: "ReferenceModel | None" = None
    # Directory of the reference's stored log-probabilities, which the training rows then carry.
    reference_scores: str | None = None


def wants_cpu(device: str) -> bool:
    """Whether `--device auto|cpu|cuda` means the CPU on this machine.

    Raises ValueError if cuda is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ValueError(
            "--device cuda: expected a visible GPU, got none; use --device cpu or auto, or check "
            "the driver and CUDA_VISIBLE_DEVICES"
        )
    return device == "cpu" or not present


def add_arguments(
    parser: argparse.ArgumentParser, scoring: bool = False
) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser and set what the model and the device decide.

    scoring: for score.py, which takes the flags of training and some of its own.

    Raises:
        ValueError: one line naming the flag, what was expected, what came, and the remedy.
    """
    training_flags.add(parser)
    if scoring:
        score_checks.add_scoring_arguments(parser)
    compat.mend_help(parser)
    if {"-h", "--help"} & set(sys.argv[1:]):  # given_flags hides the defaults that help prints
        parser.print_help()
        parser.exit()
    _resolve(parser, scoring)
    return parser


_settings: Settings | None = None


def settings() -> Settings:
    """The settings of this run; set when the command line has been parsed."""
    assert _settings is not None, "the command line has not been parsed"
    return _settings


def given_flags(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """dest → value of the flags that stand on the command line, and no defaults."""
    kept = [(action, action.default) for action in parser._actions]
    defaults, parser._defaults = parser._defaults, {}
    try:
        for action, _ in kept:
            action.default = argparse.SUPPRESS
        return vars(parser.parse_args())
    finally:
        for action, default in kept:
            action.default = default
        parser._defaults = defaults


def _reference(
    args: argparse.Namespace, checkpoint: HFCheckpoint | None, objective: Objective
) -> HFCheckpoint | None:
    """The checkpoint of the frozen model, None where nothing is compared."""
    if not (args.kl_coeff or checks.REFERENCE_STATISTICS & objective.needs):
        return None
    if args.dft_reference_scores is not None:
        return None
    if args.dft_reference_model is None:
        return checkpoint
    reference = open_checkpoint(args.dft_reference_model, trust_remote_code=args.trust_remote_code)
    assert checkpoint is not None
    checks.same_architecture(checkpoint, reference)
    same_own_layers(checkpoint, reference)
    return reference


def _gpu_defaults() -> dict[str, Any]:
    """What Megatron would assert on where transformer-engine or NVIDIA apex is not installed."""
    defaults: dict[str, Any] = {}
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if not has_te:
        defaults.update(transformer_impl="local", no_persist_layer_norm=True)
    if not has_te and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        defaults["gradient_accumulation_fusion"] = False
    return defaults


def _resolve(parser: argparse.ArgumentParser, scoring: bool) -> None:
    global _settings
    given = given_flags(parser)
    defaults = dict(TRAINING_DEFAULTS)
    checkpoint, vocab_size = None, given.get("vocab_size")
    if "hf_model" in given:
        checkpoint = open_checkpoint(
            given["hf_model"],
            given.get("hf_revision"),
            trust_remote_code=given.get("trust_remote_code", False),
        )
        bridge.check_training(given.get("hf_bridge", "auto"), checkpoint)
        model = megatron_args(checkpoint)
        checks.no_contradiction(parser, given, model, given["hf_model"])
        vocab_size = model["vocab_size"]
        defaults.update(model)
        # Every weight is read from the files, but those of multi-token prediction heads.
        defaults["perform_initialization"] = bool(given.get("mtp_num_layers"))
    # The device was chosen before Megatron was imported; torch now answers as that device would.
    defaults.update(CPU_DEFAULTS if runtime.is_active() else _gpu_defaults())
    # set_defaults accepts any name: one that this release does not know would be lost in silence.
    known = {action.dest for action in parser._actions}
    assert defaults.keys() <= known, f"no such Megatron flags: {sorted(defaults.keys() - known)}"
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    objective = registry.resolve(args)
    if scoring:
        score_checks.leave_out_training(args)
        score_checks.check_scoring(args, checks.has_virtual_stages(args))
        objective = registry.get("sft")
    else:
        score_checks.check_training(args, objective)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checks.check(args, world_size, checkpoint, objective)
    if checkpoint is not None:
        check_own_layers(args, checkpoint, runtime.is_active())
    fake_quantize.check(args)
    if vocab_size is not None:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        parser.set_defaults(padded_vocab_size=-(-vocab_size // multiple) * multiple)
    _settings = Settings(
        objective,
        checkpoint,
        vocab_size,
        _reference(args, checkpoint, objective),
        reference_scores=None if scoring else args.dft_reference_scores,
    )
