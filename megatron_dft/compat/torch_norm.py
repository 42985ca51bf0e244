"""RMSNorm in Megatron's own layers where NVIDIA apex is installed and Transformer Engine is not.

Megatron then takes apex's FusedLayerNorm for every norm of a block that is not inside a layer, and
that one knows no RMSNorm: it asserts at model build (megatron-core 0.19.2,
core/models/gpt/gpt_layer_specs.py, core/transformer/transformer_block.py).
"""

from megatron_dft.compat.hooks import wrap


def install(has_transformer_engine: bool) -> None:
    """Take torch's norm in both places, as Megatron does where apex is absent.

    has_transformer_engine: its norm, which knows RMSNorm, then stays at a block's end.
    """

    def make(original):
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        return WrappedTorchNorm

    wrap("megatron.core.models.gpt.gpt_layer_specs:LNImpl", make)
    if not has_transformer_engine:
        wrap("megatron.core.transformer.transformer_block:LayerNormImpl", make)
