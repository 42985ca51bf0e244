"""What a run stands on, said in one block at its start and by `megatron-dft preflight`.

GPU, driver, libraries, how many cuDNN the process has open, the attention that Transformer Engine
takes for this model's rows, and who does Megatron's fused accumulation of weight gradients.
"""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_dft.compat import wgrad_fusion
from megatron_dft.cpu import runtime
from megatron_dft.flags.defaults import has_transformer_engine
from megatron_dft.recovery import status
from megatron_dft.recovery.exit_codes import REFUSED
from megatron_dft.storage import terminal
from megatron_dft.training import attention

UNFUSED_REMEDY = (
    "a step takes several times as long. Let Transformer Engine find torch's cuDNN: it opens "
    '"libcudnn.so" without a version, so put a directory with a link of that name to '
    "site-packages/nvidia/cudnn/lib/libcudnn.so.9 first in LD_LIBRARY_PATH, or install one cuDNN "
    "only; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints its reasons"
)


def driver(text: str) -> str:
    """The NVIDIA driver's version, of the text of /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def libraries(maps: str, name: str) -> list[str]:
    """Directories from which a process has opened lib`name`.so*, of the text of its maps file."""
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if f"/lib{name}.so" in line}
    return sorted({os.path.dirname(os.path.realpath(path)) for path in paths})


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _dotted(number: int) -> str:
    """91900 → 9.19.0, as cuDNN encodes its version from 9 on."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def cudnn() -> str:
    """cuDNN's version; both where Transformer Engine has another one than torch."""
    found = torch.backends.cudnn.version()
    text = "none" if found is None else _dotted(found)
    if has_transformer_engine():
        import transformer_engine_torch

        other = transformer_engine_torch.get_cudnn_version()
        if other != found:
            return f"{text} (torch), {_dotted(other)} (Transformer Engine): TWO on the path"
    places = libraries(_read("/proc/self/maps"), "cudnn")
    return text if len(places) < 2 else f"{text}, opened from {' and '.join(places)}"


def describe(attention_backend: str | None, rows: str = "rows") -> list[str]:
    """The block's lines, of this process and its current GPU.

    attention_backend: as attention.backend gives it, None where it was not asked.
    """
    if runtime.is_active() or not torch.cuda.is_available():
        return [f"machine: running on the CPU over gloo; torch {torch.__version__}, megatron-core "
                f"{_package('megatron-core')}"]  # fmt: skip
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    fusion = "apex" if wgrad_fusion.is_apex_there() else "cuBLAS (no apex is needed)"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    lines = [
        f"machine: {gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB), "
        f"driver {driver(_read('/proc/driver/nvidia/version'))}",
        f"software: torch {torch.__version__}, CUDA {torch.version.cuda}, megatron-core "
        f"{_package('megatron-core')}, transformer-engine {_package('transformer-engine')}, NCCL "
        f"{nccl}, cuDNN {cudnn()}",
        f"gradient accumulation fusion: {fusion}",
    ]
    if attention_backend is not None:
        lines.append(f"attention of {rows}: {attention_backend}")
    return lines


def report(args: Any) -> None:
    """Print the block from rank 0; warn, or end the run, where attention is not fused.

    The first rank of each node looks, with --require-fused-attention every rank.

    Raises:
        SystemExit: with exit_codes.REFUSED: --require-fused-attention, and it is not.
    """
    on_gpu = not runtime.is_active() and torch.cuda.is_available()
    chosen = None
    if on_gpu and args.transformer_impl == "transformer_engine":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if args.require_fused_attention or os.environ["LOCAL_RANK"] == "0":
            chosen = attention.backend(attention.of_args(args))
    if os.environ["RANK"] == "0":
        rows = "rows of one conversation" if args.no_packing else "packed rows"
        for line in describe(chosen, rows):
            terminal.say(f"> {line}")
    if chosen is None or chosen in (attention.FUSED, attention.FLASH):
        return
    if not args.require_fused_attention:
        terminal.warn(f"warning: attention is {chosen}: {UNFUSED_REMEDY}")
        return
    message = (
        f"--require-fused-attention: expected fused or flash attention, got {chosen}; "
        f"{UNFUSED_REMEDY}"
    )
    if os.environ["LOCAL_RANK"] == "0":
        terminal.fail(f"{message}")
    if os.environ["RANK"] == "0":
        status.record("refused", message)
    raise SystemExit(REFUSED)
