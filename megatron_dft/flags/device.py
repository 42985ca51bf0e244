"""What the device can do, and Transformer Engine on it: refused before anything is built.

Megatron's own layers (`--transformer-impl local`) serve a GPU without transformer-engine for rows
of one conversation. The CPU runtime brings layers of its own (cpu/layers.py), which do more.
"""

import argparse
import importlib.util
import sys
from typing import Any

from megatron_dft.flags.defaults import has_transformer_engine
from megatron_dft.losses.refusals import Refusal, given, refuse

_INSTALL = "install transformer-engine, or drop it"

_ON_GPU: dict[str, Refusal] = {
    "use_cpu_initialization": Refusal(
        bool,
        "leaves the weights on the CPU while Hugging Face's are read and the gradient is tested "
        "over NCCL",
    ),
}

# What Megatron's own layers lack (megatron-core 0.19.2, core/transformer/dot_product_attention.py,
# torch_norm.py, core/models/backends.py).
_LOCAL: dict[str, Refusal] = {
    "sequence_parallel": Refusal(bool, "is not in Megatron's own norm", _INSTALL),
    "context_parallel_size": Refusal(
        lambda size: size > 1, "is not in Megatron's own attention", _INSTALL
    ),
    "moe_grouped_gemm": Refusal(bool, "is transformer-engine's", _INSTALL),
    "moe_permute_fusion": Refusal(bool, "is transformer-engine's", _INSTALL),
    "fp8": Refusal(given, "is transformer-engine's", _INSTALL),
    "fp4": Refusal(given, "is transformer-engine's", _INSTALL),
    "tp_comm_overlap": Refusal(bool, "is transformer-engine's", _INSTALL),
    "use_transformer_engine_op_fuser": Refusal(bool, "is transformer-engine's", _INSTALL),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag; nothing is parsed or checked."""
    parser.add_argument_group("attention").add_argument(
        "--require-fused-attention",
        action="store_true",
        help="end the run at its start where Transformer Engine would take unfused attention for "
        "the rows of this model, which costs several times the step; default: warn",
    )


def check(args: argparse.Namespace, on_cpu: bool, elsewhere: bool = False) -> None:
    """Raise one ValueError for what this device or its layers cannot do.

    args: parsed, not yet validated by Megatron. on_cpu: whether it is a CPU. elsewhere: it is not
    this machine's; transformer-engine is taken to be there.
    """
    if args.require_fused_attention and (on_cpu or args.transformer_impl == "local"):
        raise ValueError(
            "--require-fused-attention: expected a GPU and transformer-engine, got "
            f"{'a CPU' if on_cpu else '--transformer-impl local'}; drop it"
        )
    _check_async_save(args, on_cpu)
    is_local = args.transformer_impl == "local"
    if not is_local and not (elsewhere or has_transformer_engine()):
        where = "on a CPU" if on_cpu else "without transformer-engine"
        raise ValueError(
            f"--transformer-impl: expected local {where}, got {args.transformer_impl}; "
            "drop the flag" + ("" if on_cpu else ", or install transformer-engine")
        )
    if on_cpu:
        return
    refuse(args, _ON_GPU, "a GPU")
    if not is_local:
        return
    if not args.no_packing:
        raise ValueError(
            "--no-packing: expected with --transformer-impl local, whose attention takes rows of "
            "one conversation, got packed rows; install transformer-engine, or add --no-packing"
        )
    refuse(args, _LOCAL, "--transformer-impl local")


def transformer_engine_installed() -> bool:
    """Whether it is there, although the CPU runtime hides it."""
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find is not None and find("transformer_engine", None) for find in finders)


def as_on_gpu(args: argparse.Namespace, given: dict[str, Any]) -> argparse.Namespace:
    """args of a CPU's defaults as they would be on a GPU with transformer-engine.

    given: flags as typed.
    """
    of_gpu = {"transformer_impl": "transformer_engine", "use_cpu_initialization": False}
    known = {dest: given.get(dest, value) for dest, value in of_gpu.items()}
    return argparse.Namespace(**vars(args) | known)


def refused_without_te(args: argparse.Namespace) -> str | None:
    """Why a GPU would refuse these checked flags with Megatron's own layers; None where not."""
    own = {"transformer_impl": "local", "use_cpu_initialization": False}
    try:
        check(argparse.Namespace(**vars(args) | own), on_cpu=False)
    except ValueError as error:
        return str(error)
    return None


def _check_async_save(args: argparse.Namespace, on_cpu: bool) -> None:
    """Megatron switches it off in silence, or waits for ever, where its writer cannot work."""
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        raise ValueError(
            "--async-save: expected --use-persistent-ckpt-worker beside it, without which Megatron "
            "saves while training waits; add it or drop the flag"
        )
    if on_cpu:
        raise ValueError(
            "--async-save: Megatron's writer process needs CUDA, got a run on the CPU; drop it and "
            "--use-persistent-ckpt-worker"
        )
    if args.async_strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "--async-strategy nvrx: needs nvidia-resiliency-ext, which is not installed; install "
            "it or give --async-strategy mcore"
        )
