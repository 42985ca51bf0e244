"""`megatron-dft import`: a Hugging Face checkpoint as a torch_dist checkpoint for any Megatron."""

import argparse
import tempfile
from pathlib import Path

from megatron_dft.commands.conversion import add_source_arguments, bar, compare_logits, quiet
from megatron_dft.hf import bridge
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.storage.lock import held

STOCK_ROPE_FACTOR = 8.0  # what GPTModel gets whatever the flag says

SUMMARY = "Hugging Face checkpoint -> torch_dist, on CPU, without holding the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_model", help="directory or hub name of the Hugging Face model")
    parser.add_argument("out", type=Path, help="directory to write; give it to Megatron's --load")
    add_source_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="export it again and compare every byte; then compare Megatron's logits with "
        "transformers' (holds the model twice)",
    )


def run(args: argparse.Namespace) -> int:
    quiet()
    with held("OUT", args.out, beside=True):
        return _import(args)


def _import(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.hf_model, args.hf_revision, args.trust_remote_code)
    if bridge.uses_bridge(checkpoint, args.hf_bridge):
        if args.verify:
            raise ValueError(
                "--verify: runs our tables' model; through megatron-bridge every byte is compared "
                "anyway, drop it"
            )
        out = bridge.import_checkpoint(
            checkpoint,
            args.out,
            overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code,
        )
        print(f"written by megatron-bridge: {out}; every tensor comes back byte for byte")
        return 0
    # Megatron takes 10 s to import: a bad checkpoint is refused before.
    from megatron_dft.hf.config import megatron_args, own_layers
    from megatron_dft.hf.convert_import import import_checkpoint
    from megatron_dft.hf.stock_flags import megatron_flags

    with bar("import") as progress:
        out = import_checkpoint(checkpoint, args.out, overwrite=args.overwrite, progress=progress)
    print(f"written: {out}")
    if own_layers(checkpoint) is None:
        load = f"--load {out} --ckpt-format torch_dist"
        print("Megatron's flags for it:\n")
        print(" \\\n    ".join([load, *megatron_flags(checkpoint)]))
        factor = megatron_args(checkpoint).get("rope_scaling_factor", STOCK_ROPE_FACTOR)
        if factor != STOCK_ROPE_FACTOR:
            print(
                f"\nStock Megatron 0.19 takes --rope-scaling-factor {factor} and builds with "
                f"{STOCK_ROPE_FACTOR} all the same: its logits will be wrong. megatron_dft.train "
                "builds with what config.json says."
            )
    else:
        print(
            f"no flags of stock Megatron build {checkpoint.architecture}; train it with "
            f"python -m megatron_dft.train --hf-model {checkpoint.name} --load {out} …"
        )
    if args.verify:
        verify(checkpoint, out)
    return 0


def verify(checkpoint: HFCheckpoint, out: Path) -> None:
    """Raise ValueError unless the torch_dist checkpoint gives back every byte and the logits."""
    from megatron_dft.hf.compare import compare_bytes
    from megatron_dft.hf.convert_export import export_checkpoint

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".verify-") as directory:
        back = open_checkpoint(export_checkpoint(out, checkpoint, Path(directory) / "back"))
        compare_bytes(checkpoint, back)
    print("verified: every tensor comes back byte for byte")
    compare_logits(checkpoint, out)
