"""`megatron-dft import`: a Hugging Face checkpoint as a torch_dist checkpoint for any Megatron."""

import argparse
import tempfile
from pathlib import Path

from megatron_dft.hf.quiet import quiet
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint

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


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-revision", help="branch, tag or commit of the hub model")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accept a checkpoint that brings Python code (its weights are still read by our "
        "tables; transformers may run the code for the tokenizer)",
    )


def run(args: argparse.Namespace) -> int:
    quiet()
    checkpoint = open_checkpoint(args.hf_model, args.hf_revision, args.trust_remote_code)
    # Megatron takes 10 s to import: a bad checkpoint is refused before.
    from megatron_dft.hf.convert_import import import_checkpoint
    from megatron_dft.hf.flags import megatron_flags
    from megatron_dft.hf.progress import bar

    with bar("import") as progress:
        out = import_checkpoint(checkpoint, args.out, overwrite=args.overwrite, progress=progress)
    print(f"written: {out}")
    print("Megatron's flags for it:\n")
    print(" \\\n    ".join([f"--load {out} --ckpt-format torch_dist", *megatron_flags(checkpoint)]))
    if args.verify:
        verify(checkpoint, out)
    return 0


def verify(checkpoint: HFCheckpoint, out: Path) -> None:
    """Raise ValueError unless the torch_dist checkpoint gives back every byte and the logits."""
    from megatron_dft.hf.compare import compare_bytes, compare_logits
    from megatron_dft.hf.convert_export import export_checkpoint

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".verify-") as directory:
        back = open_checkpoint(export_checkpoint(out, checkpoint, Path(directory) / "back"))
        compare_bytes(checkpoint, back)
    print("verified: every tensor comes back byte for byte")
    compare_logits(checkpoint, out)
