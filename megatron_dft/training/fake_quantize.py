"""--qat: train through nvidia-modelopt's fake quantisers, so that the weights bear quantisation.

The forward pass sees each decoder linear's weight rounded to int8 or fp8 (E4M3), one scale an
output row (the row's largest magnitude in the base model); the gradient passes straight through to
the full-precision weight, which is what is exported. Activations stay as they are: their scales
would come from one rank's features and differ between tensor-parallel sizes. Embedding, norms and
output layer stay as they are too.
"""

from typing import Any

from megatron_dft.flags.quantize import FORMATS


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
