"""Flags of the model: where its weights come from, on which device, and what contradicts them."""

import argparse
from typing import Any

from megatron_dft.hf import bridge
from megatron_dft.hf.config import TRAINING_DEFAULTS, megatron_args, own_layers
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.losses.refusals import flag_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; nothing is parsed or checked."""
    group = parser.add_argument_group("model")
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


def check(args: argparse.Namespace, checkpoint: HFCheckpoint | None, on_cpu: bool) -> None:
    """Raise one ValueError where there is nothing to start from, or its layers are not reached.

    args: parsed, not yet validated by Megatron. on_cpu: whether the CPU runtime is active.
    """
    if checkpoint is None:
        raise ValueError(
            "--hf-model: expected a Hugging Face checkpoint to start from, got none; give a "
            "directory or a hub name"
        )
    _check_own_layers(args, checkpoint, on_cpu)


def _check_own_layers(args: argparse.Namespace, checkpoint: HFCheckpoint, on_cpu: bool) -> None:
    """What cannot be combined with layers that Megatron lacks (hf/families/gemma_layers.py)."""
    own = own_layers(checkpoint)
    if own is None:
        return
    name = checkpoint.architecture
    if own.attention_softcap is not None and not on_cpu:
        raise ValueError(
            f"--device cuda: {name} has soft-capped attention scores (attn_logit_softcapping "
            f"{own.attention_softcap}), which Transformer Engine's attention lacks; use --device "
            "cpu, or a Gemma 3"
        )
    if args.transformer_impl != ("local" if on_cpu else "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {args.transformer_impl}: {name} has zero-centred norms, which "
            "Megatron's own layers lack; on a GPU install transformer-engine and drop the flag"
        )
    refused = {
        "--mtp-num-layers": args.mtp_num_layers,
        "--qat": args.qat,
        "--use-transformer-engine-op-fuser": getattr(
            args, "use_transformer_engine_op_fuser", False
        ),
        "--attention-backend local": getattr(args.attention_backend, "name", "") == "local",
    }
    for flag, given in refused.items():
        if given:
            raise ValueError(f"{flag}: does not know the layers of {name}; drop the flag")


def head_lacks(checkpoint: HFCheckpoint | None) -> str | None:
    """Why the loss of this model cannot be taken from its hidden states; None where it can."""
    own = None if checkpoint is None else own_layers(checkpoint)
    if own is None or own.logit_softcap is None:
        return None
    assert checkpoint is not None
    return (
        f"{checkpoint.architecture} has soft-capped logits (final_logit_softcapping "
        f"{own.logit_softcap}), which the head does not compute"
    )


def same_architecture(checkpoint: HFCheckpoint, reference: HFCheckpoint) -> None:
    """Raise ValueError unless the reference is built by the very flags of the trained model."""
    mine, theirs = megatron_args(checkpoint), megatron_args(reference)
    for dest in sorted(mine.keys() | theirs.keys()):
        if mine.get(dest) != theirs.get(dest):
            raise ValueError(
                f"--dft-reference-model: expected {flag_of(dest)} {mine.get(dest)} as in "
                f"{checkpoint.name}, got {theirs.get(dest)} in {reference.name}; give a model of "
                "the same shape"
            )
    if own_layers(checkpoint) != own_layers(reference):
        raise ValueError(
            f"--dft-reference-model: expected the layers of {checkpoint.name} "
            f"({own_layers(checkpoint)}), got those of {reference.name} ({own_layers(reference)}); "
            "give a model of the same family"
        )
