"""Defaults of ours where Megatron's do not serve fine-tuning, or ask for what the device lacks.

Each holds only where the flag is not given.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

# What the CPU lacks is switched off; the program is otherwise the same.
CPU_DEFAULTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
}

TRAINING_DEFAULTS: dict[str, Any] = {
    # Every supervised token of the global batch weighs the same in any layout.
    "calculate_per_token_loss": True,
    "micro_batch_size": 1,
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "log_interval": 1,
    "eval_iters": 0,
    "eval_interval": 1000,
    "ckpt_format": "torch_dist",
    "tokenizer_type": "NullTokenizer",
    "split": "100,0,0",
    "create_attention_mask_in_dataloader": False,
    "check_for_nan_in_loss_and_grad": True,
    "num_workers": 0,
}


def requested_device(argv: Sequence[str]) -> str:
    """--device, before Megatron's parser exists: its import must find the CPU runtime in place."""
    chosen = "auto"
    for index, word in enumerate(argv):
        if word == "--device" and index + 1 < len(argv):
            chosen = argv[index + 1]
        elif word.startswith("--device="):
            chosen = word.split("=", 1)[1]
    return chosen


def wants_cpu(device: str) -> bool:
    """Whether `--device auto|cpu|cuda` means the CPU on this machine.

    Raises ValueError if cuda is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ValueError(
            "--device cuda: expected a visible GPU, got none; use --device cpu or auto, or check "
            "the driver and CUDA_VISIBLE_DEVICES"
        )
    return device == "cpu" or not present


# What Transformer Engine brings and Megatron's own layers lack, where it is on by default.
WITHOUT_TE: dict[str, Any] = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
}


def has_transformer_engine() -> bool:
    """Whether transformer-engine can be imported; the CPU runtime hides it."""
    return importlib.util.find_spec("transformer_engine") is not None


def gpu_defaults(transformer_impl: str | None = None) -> dict[str, Any]:
    """What Megatron's own layers would fail on, where they are taken; {} with transformer-engine.

    transformer_impl: as given on the command line. NVIDIA apex decides nothing: what Megatron
    wants of it compat/wgrad_fusion.py does, and compat/torch_norm.py does without.
    """
    return {} if has_transformer_engine() and transformer_impl != "local" else dict(WITHOUT_TE)
