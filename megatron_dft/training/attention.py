"""Which attention Transformer Engine takes for the rows of this model: asked by running a little.

TE decides by shapes, dtype, masks, its own release, cuDNN's and the environment, and says nothing:
packed rows on unfused attention cost 4.3 times the step. Its rules differ from release to release,
so its DotProductAttention is called once as Megatron calls it (core/extensions/
transformer_engine.py), and what it has chosen is read where it keeps it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FUSED, FLASH, UNFUSED = "fused (cuDNN)", "flash", "unfused"
_TOKENS = 512
# --attention-backend → NVTE_FLASH_ATTN, NVTE_FUSED_ATTN, NVTE_UNFUSED_ATTN, as Megatron sets them.
_SWITCHES = {"flash": "100", "fused": "010", "unfused": "001"}


@dataclass(frozen=True)
class AttentionShape:
    """A layer's attention on one rank.

    heads, groups: query heads and key-value heads of this rank. window: tokens back, or None.
    packed: several conversations a row (thd), else one (sbhd). backend: --attention-backend.
    """

    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    packed: bool = True
    window: int | None = None
    backend: str = "auto"


def of_args(args: Any) -> AttentionShape:
    """The attention that these flags of Megatron's ask for; args validated."""
    size = args.tensor_model_parallel_size
    window = args.window_size[0] if getattr(args, "window_size", None) else None
    return AttentionShape(
        heads=args.num_attention_heads // size,
        groups=max((args.num_query_groups or args.num_attention_heads) // size, 1),
        head_dim=args.kv_channels,
        dtype=args.params_dtype,
        packed=not args.no_packing,
        window=window,
        backend=getattr(args.attention_backend, "name", str(args.attention_backend)),
    )


def of_command_line(words: list[str]) -> AttentionShape | None:
    """The same of a training command's words, where --hf-model is a directory; else None."""
    given: dict[str, str] = {}
    for at, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            given[flag] = value or next(iter(words[at + 1 : at + 2]), "")
    path = Path(given.get("--hf-model", "")) / "config.json"
    if not given.get("--hf-model") or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    size = int(given.get("--tensor-model-parallel-size", 1))
    heads = config["num_attention_heads"]
    return AttentionShape(
        heads=heads // size,
        groups=max(config.get("num_key_value_heads", heads) // size, 1),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        dtype=torch.float32 if "--bf16" not in given else torch.bfloat16,
        packed="--no-packing" not in given,
        backend=given.get("--attention-backend", "auto"),
    )


def backend(shape: AttentionShape, device: str = "cuda") -> str:
    """FUSED, FLASH or UNFUSED; where TE refuses, "none" with its reason.

    Runs a row of 512 tokens forward on the current device.
    """
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention import dot_product_attention

    with _switches(shape.backend):
        try:
            _call(DotProductAttention, shape, device)
        except Exception as error:
            return f"none: {str(error).splitlines()[0]}" if str(error) else "none"
    chosen = dot_product_attention._attention_backends
    if chosen.get("use_flash_attention"):
        return FLASH
    return FUSED if chosen.get("use_fused_attention") else UNFUSED


def _call(attention: Any, shape: AttentionShape, device: str) -> None:
    def tokens(heads: int) -> torch.Tensor:
        size = (_TOKENS, heads, shape.head_dim) if shape.packed else (
            _TOKENS, 1, heads, shape.head_dim)  # fmt: skip
        return torch.zeros(size, dtype=shape.dtype, device=device, requires_grad=True)

    window = None if shape.window is None else (shape.window, 0)
    mask = "padding_causal" if shape.packed else "causal"
    layout = "thd" if shape.packed else "sbhd"
    layer = attention(
        shape.heads,
        shape.head_dim,
        num_gqa_groups=shape.groups,
        attention_dropout=0.0,
        qkv_format=layout,
        attn_mask_type=mask,
        window_size=window,
    )
    given: dict[str, Any] = {}
    if shape.packed:
        edges = torch.tensor([0, 200, _TOKENS], dtype=torch.int32, device=device)
        given = {f"max_seqlen_{of}": _TOKENS - 200 for of in ("q", "kv")}
        given |= {f"cu_seqlens_{of}": edges for of in ("q", "kv", "q_padded", "kv_padded")}
    layer(
        tokens(shape.heads), tokens(shape.groups), tokens(shape.groups),
        qkv_format=layout, attn_mask_type=mask, window_size=window, **given,
    )  # fmt: skip


@contextlib.contextmanager
def _switches(name: str) -> Iterator[None]:
    """TE's environment as --attention-backend will set it; as it is for auto."""
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    kept = {n: os.environ[n] for n in names if n in os.environ}
    os.environ.update(zip(names, _SWITCHES.get(name, ""), strict=False))
    try:
        yield
    finally:
        for n in names:
            os.environ.pop(n, None)
        os.environ.update(kept)
