"""What cannot be combined with Gemma's layers, which Megatron lacks: refused before a build."""

import argparse

from megatron_dft.hf.config import own_layers
from megatron_dft.hf.source import HFCheckpoint


def check_own_layers(args: argparse.Namespace, checkpoint: HFCheckpoint, on_cpu: bool) -> None:
    """Raise one ValueError naming the flag that `gemma_layers.py` does not reach, and the remedy.

    args: Megatron's, parsed.
    """
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
    if own.logit_softcap is not None and args.loss_chunk_size is not None:
        raise ValueError(
            f"--loss-chunk-size: {name} has soft-capped logits (final_logit_softcapping "
            f"{own.logit_softcap}), which the chunked head does not compute; drop the flag"
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


def same_own_layers(checkpoint: HFCheckpoint, reference: HFCheckpoint) -> None:
    """Raise ValueError unless the reference model has the very layers of the trained one."""
    mine, theirs = own_layers(checkpoint), own_layers(reference)
    if mine != theirs:
        raise ValueError(
            f"--dft-reference-model: expected the layers of {checkpoint.name} ({mine}), got those "
            f"of {reference.name} ({theirs})"
        )
