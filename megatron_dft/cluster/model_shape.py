"""How many parameters of a Hugging Face model one rank of a layout holds, from config.json alone.

Follows Megatron's placement (core/models/gpt, core/transformer): matrices are split over
tensor-parallel ranks, norms and the router are not, experts are split over expert-parallel ranks;
the embedding lies on the first pipeline stage, the output layer and the last norm on the last.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    `experts` is 0 for a dense model, `shared` the shared experts' width, `dense_layers` the layers
    of a mixture of experts that have none.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared: int = 0
    dense_layers: frozenset[int] = frozenset()
    positions: int = 0

    def padded_vocab(self, tp: int, multiple: int = 128) -> int:
        """Megatron's vocabulary size: a multiple of --make-vocab-size-divisible-by × TP."""
        step = multiple * tp
        return -(-self.vocab // step) * step

    def attention(self, tp: int) -> float:
        """Parameters of one layer's attention and of its two norms, per rank."""
        wide = (self.heads + 2 * self.kv_heads) * self.head_dim
        matrices = self.hidden * wide + self.heads * self.head_dim * self.hidden
        bias = wide if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return (matrices + bias) / tp + norms

    def mlp(self, width: int, tp: int) -> float:
        """Parameters of a gated MLP of that width, per rank."""
        return 3 * self.hidden * width / tp

    def stage(self, tp: int, pp: int, ep: int, number: int, multiple: int) -> tuple[float, float]:
        """(dense, expert) parameters of a rank on pipeline stage `number` of `pp`.

        Experts are not split by tensor parallelism (--expert-tensor-parallel-size 1).
        """
        each = self.layers // pp
        held = range(number * each, (number + 1) * each)
        dense = each * self.attention(tp)
        expert = 0.0
        for layer in held:
            if not self.experts or layer in self.dense_layers:
                dense += self.mlp(self.ffn, tp)
            else:
                dense += self.hidden * self.experts + self.mlp(self.shared, tp)
                expert += self.experts / ep * self.mlp(self.expert_ffn, 1)
        table = self.padded_vocab(tp, multiple) / tp * self.hidden
        last = number == pp - 1
        if number == 0:
            dense += table
        if last:
            # A tied output layer is the embedding itself, or its copy on another stage.
            dense += self.hidden + (table if pp > 1 or not self.tied else 0)
        return dense, expert

    def total(self) -> float:
        """Parameters of the model, its vocabulary not padded."""
        dense, expert = self.stage(1, 1, 1, 0, 1)
        return dense + expert


def read_config(source: str) -> dict[str, Any]:
    """config.json of a directory, of the file itself, or of a hub name.

    Raises ValueError where it is none of these.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # of each try it would tell
        try:
            path = Path(hf_hub_download(source, "config.json"))
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
            raise ValueError(
                f"{source!r} is neither a directory with config.json, nor such a file, nor a model "
                f"that the hub gives: {reason}. Give its directory; without a network "
                "HF_HUB_OFFLINE=1 takes what the cache has and does not wait"
            ) from None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path}: cannot be read as JSON: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
          "vocab_size")  # fmt: skip
_OPTIONAL = (
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok",
    "decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_MOST_LAYERS = 10_000


def _check_sizes(config: dict[str, Any]) -> None:
    """Raise ValueError where a size is none."""
    for key in (*_SIZES, *_OPTIONAL):
        value, least = config.get(key), int(key in _SIZES)
        most = _MOST_LAYERS if key == "num_hidden_layers" else 2**31
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"config.json: {key}: expected a whole number from {least} to {most}, got "
                f"{str(value)[:40]!r}"
            )
    dense = config.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(type(n) is int for n in dense)):
        raise ValueError(f"config.json: mlp_only_layers: expected numbers, got {str(dense)[:40]!r}")


def shape_of(config: dict[str, Any]) -> Shape:
    """The sizes that config.json gives.

    Raises ValueError for an architecture whose layers this arithmetic does not know.
    """
    kind = config.get("model_type")
    known = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "phi3")
    if kind not in known:
        raise ValueError(f"model_type: expected one of {', '.join(known)}, got {str(kind)[:60]!r}")
    _check_sizes(config)
    heads = config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    every = config.get("decoder_sparse_step") or 1
    dense = {i for i in range(config["num_hidden_layers"]) if (i + 1) % every}
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind in ("qwen2", "qwen2_moe") or bool(config.get("attention_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        experts=experts,
        top_k=config.get("num_experts_per_tok") or 0,
        expert_ffn=config.get("moe_intermediate_size") or (config["intermediate_size"]),
        shared=config.get("shared_expert_intermediate_size") or 0,
        dense_layers=frozenset(dense | set(config.get("mlp_only_layers") or ())),
        positions=config.get("max_position_embeddings") or 0,
    )
