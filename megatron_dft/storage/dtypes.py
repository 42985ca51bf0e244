"""Names of dtypes: those of the safetensors format, and Megatron's words on a command line.

The format: https://github.com/huggingface/safetensors#format
"""

import argparse
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Megatron's words; torch's, which older command lines have, mean the same.
WORDS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_ALIASES = {str(dtype).removeprefix("torch."): word for word, dtype in WORDS.items()}


def dtype_word(text: str) -> str:
    """The `type=` of a dtype flag: a key of WORDS, for that word or torch's name of it.

    >>> dtype_word("bfloat16")
    'bf16'
    """
    word = _ALIASES.get(text, text)
    if word not in WORDS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(WORDS)}, got {text!r}")
    return word


def trained_word(args: Any) -> str:
    """The word for the dtype that Megatron's args train in."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
