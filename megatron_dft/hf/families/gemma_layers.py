"""What Gemma 2 and 3 have and Megatron's layers lack, as small modules hung into its layer spec.

Norms after attention and MLP (inside the row-parallel linear before them, so that they sit where
the output is whole and the module tree stays Megatron's), an embedding scaled by sqrt(h), a rotary
base of its own for the layers with a sliding window, GELU by its tanh form, soft-capped attention
scores and logits. Works on whatever linear, norm and attention the spec holds: the CPU layers or
Transformer Engine's.

Source: arXiv 2408.00118 (Gemma 2), 2503.19786 (Gemma 3); transformers' models/gemma2 and gemma3.

Shape legend, per rank: s sequence (s/cp, s/tp under sequence parallelism), b micro-batch, h hidden
size, d head dimension.
"""

import functools
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec
from torch import Tensor

from megatron_dft.hf.families.base import OwnLayers


def gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


class GemmaLayer(TransformerLayer):
    """Megatron's layer; the first one scales the embedding, windowed ones have their own angles."""

    def __init__(self, *args: Any, own: OwnLayers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers rounds the factor to the dtype of the embedding: 55.4 is 55.5 in bf16.
        scale = torch.tensor(own.embedding_scale, dtype=self.config.params_dtype, device="cpu")
        self.embedding_scale = scale.item() if self.layer_number == 1 else None
        self.local_base = own.local_rotary_base if own.is_local(self.layer_number) else None
        self.position_factor = own.position_factor

    def _forward_attention(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> Any:
        """hidden_states [s, b, h]; rotary_pos_emb: angles [s, 1, 1, d] (or a pair of them)."""
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        if self.local_base is not None:
            if isinstance(rotary_pos_emb, tuple):
                rotary_pos_emb = tuple(map(self._local_angles, rotary_pos_emb))
            else:
                rotary_pos_emb = self._local_angles(rotary_pos_emb)
        return super()._forward_attention(
            hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )

    def _local_angles(self, angles: Tensor) -> Tensor:
        """The same positions with this layer's base, fp32; whatever the layout gave the rank.

        The first frequency is 1 for every base, so the first angle is the position itself (divided
        by the factor of linear scaling): nothing has to be known of packing or context parallelism.
        """
        width = angles.shape[-1]
        positions = (angles[..., :1] * self.position_factor).round()
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=angles.device) / width
        half = positions * (1.0 / (self.local_base**powers))
        return torch.cat((half, half), dim=-1)


@functools.cache
def with_post_norm(linear: type, norm: Any) -> type:
    """`linear` (row parallel, no bias) with a norm over its whole output, as `post_layernorm`."""

    class NormedRowParallelLinear(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.post_layernorm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            output, bias = super().forward(*args, **kwargs)
            assert bias is None, "a bias would be added after the norm"
            return self.post_layernorm(output), None

    return NormedRowParallelLinear


def gemma_layer_spec(spec: ModuleSpec, own: OwnLayers, norm: Any) -> ModuleSpec:
    """Hang the modules into a (fresh) spec of Megatron's dense layer; changes and returns it.

    Raises ValueError where the scores have a soft cap and the spec's attention knows none.
    """
    assert spec.module is TransformerLayer, "not a dense layer"
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.keywords
    if own.attention_softcap is not None:
        core = attention.core_attention
        if not getattr(core, "takes_logit_softcap", False):
            raise ValueError(
                f"--hf-model: the attention scores have a soft cap of {own.attention_softcap}, "
                f"which {core.__name__} does not compute; use --device cpu"
            )
        attention.core_attention = ModuleSpec(
            module=core, params={"logit_softcap": own.attention_softcap}
        )
    attention.linear_proj = with_post_norm(attention.linear_proj, norm)
    mlp["submodules"].linear_fc2 = with_post_norm(mlp["submodules"].linear_fc2, norm)
    spec.module, spec.params = GemmaLayer, {**spec.params, "own": own}
    return spec


def _norm_of(spec: ModuleSpec) -> Any:
    """The norm module of the spec: Transformer Engine's spec fuses those of the layer itself."""
    submodules = spec.submodules
    if "pre_mlp_layernorm." in submodules.sharded_state_dict_keys_map:
        return submodules.pre_mlp_layernorm
    from megatron.core.models.gpt import gpt_layer_specs

    return gpt_layer_specs.TENorm


class GemmaBuilder(GPTModelBuilder):
    """Megatron's builder; caps the logits of a model that has an output layer."""

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super().build_model(*args, **kwargs)
        cap = self._model_config.own_layers.logit_softcap
        if cap is not None and model.post_process:
            # Before `mask_padded_vocab`, whose −inf would become −cap.
            model.output_layer.register_forward_hook(
                lambda module, inputs, output: (soft_cap(output[0], cap), output[1])
            )
        return model


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), in the dtype of the logits [s, b, V/tp]."""
    return cap * torch.tanh(logits / cap)


def apply(model_config: Any, own: OwnLayers) -> None:
    """Make Megatron's GPTModelConfig, layer spec already set, build the architecture of `own`."""
    transformer = model_config.transformer
    transformer.layernorm_zero_centered_gamma = True
    transformer.softmax_scale = own.softmax_scale
    transformer.gated_linear_unit = True
    transformer.activation_func = gelu_tanh
    transformer.bias_activation_fusion = False  # Megatron has fused SiLU and erf GELU alone
    inner = model_config.transformer_layer_spec or default_layer_spec

    def layer_spec(config: Any, vp_stage: int | None = None) -> ModuleSpec:
        spec = inner(config, vp_stage)
        return gemma_layer_spec(spec, own, _norm_of(spec))

    model_config.transformer_layer_spec = layer_spec
    model_config.own_layers = own
    model_config.builder = f"{GemmaBuilder.__module__}.{GemmaBuilder.__name__}"
