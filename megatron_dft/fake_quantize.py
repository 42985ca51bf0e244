"""--qat: train through nvidia-modelopt's fake quantisers, so that the weights bear quantisation.

The forward pass sees each decoder linear's weight rounded to int8 or fp8 (E4M3), one scale an
output row (the row's largest magnitude in the base model); the gradient passes straight through to
the full-precision weight, which is what is exported. Activations stay as they are: their scales
would come from one rank's features and differ between tensor-parallel sizes. Embedding, norms and
output layer stay as they are too.
"""

import argparse
import importlib.util
from typing import Any

FORMATS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


def add_arguments(group: Any) -> None:
    group.add_argument(
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


def insert(chunk: Any, name: str) -> int:
    """Put fake quantisers on a bare GPTModel chunk that holds its weights; returns their number.

    In place. Each output row's scale is the largest magnitude over all tensor-parallel ranks.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*decoder.layers.*.weight_quantizer",
                "cfg": {"num_bits": FORMATS[name], "axis": 0},
            },
        ],
        "algorithm": "max",
    }
    mtq.quantize(chunk, config)
    found = [m for m in chunk.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    layers = len(chunk.decoder.layers)
    if len(found) != 4 * layers:
        raise RuntimeError(
            f"--qat {name}: modelopt quantises {len(found)} weights of {layers} layers, expected "
            "4 a layer (qkv, proj, fc1, fc2); this modelopt does not know the layers"
        )
    return len(found)
