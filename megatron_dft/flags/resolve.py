"""Our flags beside Megatron's, and every check of a user's settings before anything is built.

`add_arguments` is the `extra_args_provider` of Megatron's parser. It parses the command line once
itself, so that it can tell the flags that were given from defaults: what the Hugging Face config
and the device decide becomes a default, and a given flag that contradicts them is an error.

A flag is defined and refused in the file of its subject; this one gathers them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_dft.compat.release import mend_help
from megatron_dft.cpu import runtime
from megatron_dft.flags import (
    batch,
    data,
    defaults,
    device,
    evaluation,
    help_page,
    lens,
    megatron,
    model,
    objective,
    output,
    quantize,
    route,
    schedule,
    scores,
)
from megatron_dft.flags.definitions import define, refuse_in_one_line
from megatron_dft.flags.settings import Settings, set_settings
from megatron_dft.hf import bridge
from megatron_dft.hf.config import megatron_args
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.losses import registry
from megatron_dft.losses.registry import Objective

Opener = Callable[..., HFCheckpoint]


def add_arguments(
    parser: argparse.ArgumentParser,
    scoring: bool = False,
    opener: Opener = open_checkpoint,
    for_gpus: bool = False,
) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser and set what the model and the device decide.

    scoring: for score.py, which takes the flags of training and some of its own. opener: opens
    --hf-model; as hf.source.open_checkpoint. for_gpus: the CPU runtime stands in for GPUs that the
    run will have: Megatron gets a CPU's defaults, ours are judged as on a GPU.

    Raises:
        ValueError: one line naming the flag, what was expected, what came, and the remedy.
    """
    megatrons = list(parser._action_groups)
    define(parser, scoring)
    mend_help(parser)
    if help_page.MEGATRON in sys.argv[1:]:
        parser.set_defaults(**defaults.TRAINING_DEFAULTS)
        help_page.print_megatrons(megatrons)
        parser.exit()
    refuse_in_one_line(parser)
    _resolve(parser, scoring, opener, on_cpu=runtime.is_active() and not for_gpus)
    return parser


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


def _resolve(parser: argparse.ArgumentParser, scoring: bool, opener: Opener, on_cpu: bool) -> None:
    given = given_flags(parser)
    chosen = dict(defaults.TRAINING_DEFAULTS)
    checkpoint, vocab_size = None, given.get("vocab_size")
    if "hf_model" in given:
        checkpoint = opener(
            given["hf_model"],
            given.get("hf_revision"),
            trust_remote_code=given.get("trust_remote_code", False),
        )
        bridge.check_training(given.get("hf_bridge", "auto"), checkpoint)
        of_model = megatron_args(checkpoint)
        model.no_contradiction(parser, given, of_model, given["hf_model"])
        vocab_size = of_model["vocab_size"]
        chosen.update(of_model)
        # Every weight is read from the files, but those of multi-token prediction heads.
        chosen["perform_initialization"] = bool(given.get("mtp_num_layers"))
    # The device was chosen before Megatron was imported; torch now answers as that device would.
    chosen.update(
        defaults.CPU_DEFAULTS
        if runtime.is_active()
        else defaults.gpu_defaults(given.get("transformer_impl"))
    )
    # set_defaults accepts any name: one that this release does not know would be lost in silence.
    known = {action.dest for action in parser._actions}
    assert chosen.keys() <= known, f"no such Megatron flags: {sorted(chosen.keys() - known)}"
    parser.set_defaults(**chosen)
    args = parser.parse_args()
    asked = registry.resolve(args)
    if scoring:
        scores.leave_out_training(args)
        scores.check_scoring(args)
        asked = registry.get("sft")
    else:
        scores.check_training(args, asked)
        evaluation.check(args, given)
    of_device = args if on_cpu == runtime.is_active() else device.as_on_gpu(args, given)
    _check(args, checkpoint, asked, of_device, on_cpu)
    parser.set_defaults(eval_interval=evaluation.interval(args, given))
    padded = args.padded_vocab_size or 0
    if vocab_size is not None:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        padded = -(-vocab_size // multiple) * multiple
        parser.set_defaults(padded_vocab_size=padded)
    set_settings(
        Settings(
            asked,
            checkpoint,
            vocab_size,
            route.resolve(args, asked, padded, on_cpu, model.head_lacks(checkpoint)),
            _reference(args, checkpoint, asked, opener),
            reference_scores=None if scoring else args.dft_reference_scores,
            whole_evaluation=evaluation.is_whole(args, given),
            full_weight=objective.FULL_WEIGHT[args.dft_full_weight],
            weighs_normalizer=args.loss_normalizer == "weights",
        )
    )


def _check(
    args: argparse.Namespace,
    checkpoint: HFCheckpoint | None,
    asked: Objective,
    of_device: argparse.Namespace,
    on_cpu: bool,
) -> None:
    """Every refusal that needs no validation by Megatron (recovery.check does).

    of_device: args with the defaults of the device that the run will have.
    """
    megatron.refuse_settings(args, asked)
    device.check(of_device, on_cpu, elsewhere=on_cpu != runtime.is_active())
    objective.check(args, asked)
    model.check(of_device, checkpoint, on_cpu)
    route.check(args, asked, model.head_lacks(checkpoint))
    data.check(args)
    schedule.check_epochs(args)
    schedule.check(args)
    batch.check(args, int(os.environ.get("WORLD_SIZE", "1")))
    lens.check(args)
    output.check(args, checkpoint)
    if checkpoint is not None:
        megatron.refuse_layout(args, checkpoint)
    quantize.check(args)


def _reference(
    args: argparse.Namespace, checkpoint: HFCheckpoint | None, asked: Objective, opener: Opener
) -> HFCheckpoint | None:
    """The checkpoint of the frozen model, None where nothing is compared."""
    if not objective.compares(args, asked) or args.dft_reference_scores is not None:
        return None
    if args.dft_reference_model is None:
        return checkpoint
    reference = opener(args.dft_reference_model, trust_remote_code=args.trust_remote_code)
    assert checkpoint is not None
    model.same_architecture(checkpoint, reference)
    return reference
