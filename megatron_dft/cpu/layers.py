"""Norm and core attention for the CPU: what Megatron's local layer spec lacks.

Megatron's local spec is used as it is, with these two modules in the place of its norm (which
asserts against sequence parallelism and zero-centred gamma) and its attention (no packed sequences,
no context parallelism). Parameter names and torch_dist keys stay those of the local spec.

Shape legend, all per rank: s sequence (s/cp under context parallelism, s/tp inside the norm under
sequence parallelism), b micro-batch, n heads per tensor-parallel rank, g query groups per rank,
d head dimension, t packed tokens, h hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_dft.cpu.context import gather_kv, visible_keys


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in fp32, right under sequence parallelism.

    Args: the builder protocol of Megatron's specs. `hidden_size` is the length of the last axis.
    Input and output [..., hidden_size] in the model's dtype. With `layernorm_zero_centered_gamma`
    the weight is an offset from 1 (Gemma).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(
                f"--normalization {config.normalization}: the CPU layers have RMSNorm and LayerNorm"
            )
        self.eps = eps
        self.shape = (hidden_size,)
        self.rms = config.normalization == "RMSNorm"
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(
            torch.full(self.shape, 1.0 - self.offset, dtype=config.params_dtype)
        )
        self.bias = (
            None
            if self.rms
            else torch.nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        )
        # Each rank's norm sees its own tokens: Megatron all-reduces the gradients so marked.
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset
        if self.rms:
            return F.rms_norm(x.float(), self.shape, weight, self.eps).to(x.dtype)
        assert self.bias is not None
        return F.layer_norm(x.float(), self.shape, weight, self.bias.float(), self.eps).to(x.dtype)


class Attention(MegatronModule):
    """Causal attention: grouped queries, sbhd or packed thd, windows, context parallelism, sinks,
    soft-capped scores (`logit_softcap` c: c · tanh(score / c) before the mask).

    Keys and values of the whole sequence are gathered over the context-parallel group (their
    gradient is reduce-scattered back); the mask comes from global positions. Takes the arguments of
    Megatron's core attention modules; `attention_mask` is True where a key is hidden.
    """

    takes_logit_softcap = True  # see gemma_layers.py

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        logit_softcap: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale  # None: 1/sqrt(d)
        self.softcap = logit_softcap
        self.window: tuple[int, int] | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window = config.window_size
        if config.apply_query_key_layer_scaling:
            raise ValueError(
                "--apply-query-key-layer-scaling: not in the CPU attention; drop the flag"
            )
        self.softmax_offset: Tensor | None = None
        heads = config.num_attention_heads // self.tp_group.size()
        if config.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(heads, dtype=config.params_dtype)
        elif config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] → [s, b, n·d]; packed: [t, …], no b."""
        assert attention_bias is None, "no attention bias in the CPU attention"
        packed = query.dim() == 3
        if packed:
            assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        boundaries = None
        if packed_seq_params is not None:
            boundaries = packed_seq_params.cu_seqlens_q_padded
            if boundaries is None:
                boundaries = packed_seq_params.cu_seqlens_q
        key, value = gather_kv(key, value, self.cp_group)
        if boundaries is None and attention_mask is None and self._is_plain(query, key):
            context = self._attend(query, key, value, None)
        elif boundaries is not None and self.cp_group.size() == 1 and self.window is None:
            # One conversation at a time: Σ len² instead of t² scores.
            edges = boundaries.tolist()
            context = torch.cat(
                [
                    self._attend(query[a:b], key[a:b], value[a:b], None)
                    for a, b in zip(edges, edges[1:] + [query.shape[0]], strict=True)
                    if b > a
                ]
            )
        else:
            visible = visible_keys(
                query.shape[0], self.cp_group, boundaries, self.window, query.device
            )
            if attention_mask is not None:
                visible = visible & ~attention_mask
            context = self._attend(query, key, value, visible)
        context = context.flatten(-2)
        return context.squeeze(1) if packed else context

    def _is_plain(self, query: Tensor, key: Tensor) -> bool:
        return self.window is None and query.shape[0] == key.shape[0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """[s, b, n, d] to [k, b, g, d]; `visible` [s, k] or [b, 1, s, k], None: causal."""
        repeat = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        if self.softmax_offset is not None or self.softcap is not None:
            context = self._attend_by_scores(q, k, v, visible, dropout)
        elif dropout:
            with get_cuda_rng_tracker().fork():
                context = F.scaled_dot_product_attention(
                    q, k, v, visible, dropout, is_causal=visible is None, scale=self.scale
                )
        else:
            context = F.scaled_dot_product_attention(
                q, k, v, visible, is_causal=visible is None, scale=self.scale
            )
        return context.permute(2, 0, 1, 3)

    def _attend_by_scores(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float
    ) -> Tensor:
        """Softmax of soft-capped scores, with one more logit a head that takes probability and
        gives no value: what PyTorch's fused attention lacks.
        """
        if visible is None:
            visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        scale = self.scale if self.scale is not None else q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.transpose(-1, -2)).to(wide) * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if self.softmax_offset is None:
            weights = scores.softmax(-1)
        else:
            sink = self.softmax_offset.to(wide)[None, :, None, None].expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        if dropout:
            with get_cuda_rng_tracker().fork():
                weights = F.dropout(weights, dropout)
        return weights.to(v.dtype) @ v

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict:
        """The learnable sinks, sharded over heads (the only parameter here)."""
        state = {}
        if isinstance(self.softmax_offset, torch.nn.Parameter):
            state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def replacements() -> list[tuple[Any, str, Any]]:
    """Rows of the CPU runtime's table: where Megatron picks its local norm and attention."""
    import megatron.core.models.backends as backends
    import megatron.core.models.gpt.gpt_layer_specs as gpt_layer_specs
    import megatron.core.transformer.transformer_block as transformer_block

    provider = backends.LocalSpecProvider
    return [
        (provider, "layer_norm", lambda self, *args, **kwargs: Norm),
        (provider, "core_attention", lambda self: Attention),
        (gpt_layer_specs, "LNImpl", Norm),
        (transformer_block, "LayerNormImpl", Norm),
    ]
