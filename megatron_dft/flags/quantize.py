"""The flag of quantisation-aware training; training/fake_quantize.py does it."""

import argparse
import importlib.util
from typing import Any

FORMATS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag; nothing is parsed or checked."""
    parser.add_argument_group("quantisation").add_argument(
        "--qat",
        choices=sorted(FORMATS),
        help="quantisation-aware training: the forward pass rounds the decoder's weights to this "
        "format, one scale an output row (needs nvidia-modelopt); full-precision weights are "
        "exported",
    )


def check(args: argparse.Namespace) -> None:
    """Raise one ValueError for what has not been proven with fake quantisers."""
    if args.qat is None:
        return
    if importlib.util.find_spec("modelopt") is None:
        raise ValueError(
            f"--qat {args.qat}: needs nvidia-modelopt, which is not installed; "
            "pip install 'megatron-dft[modelopt]'"
        )
    refused = {
        "--save": (args.save, "its checkpoints would have other keys; use --save-hf"),
        "--load": (args.load, "give the exported checkpoint as --hf-model"),
        "--num-experts": (args.num_experts, "experts have not been proven with it"),
        "--fp8-format": (args.fp8, "computes in fp8 already; drop one of the two"),
    }
    for flag, (value, why) in refused.items():
        if value is not None:
            raise ValueError(f"--qat {args.qat}: not with {flag}; {why}")
