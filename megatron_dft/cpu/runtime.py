# ruff: noqa: E501 (the table of replacements is wide)
"""Run Megatron's CUDA-only training loop on CPU with gloo: one table of replacements, reversible.

Megatron-Core 0.19 asks torch.cuda for a device, streams, random states and memory figures, and asserts
on CUDA tensor types. `activate()` gives it answers that are true of a CPU; `deactivate()` puts every
replaced attribute back. Each entry names an attribute that must exist: where an upstream release moved
it, activation fails and says which.

| what | where | replaced by | why |
|---|---|---|---|
| devices | every torch function call with `device=`, `.to()`, `.cuda()` | CPU | `device="cuda"` is hard-coded |
| pinned memory | `pin_memory=` and `.pin_memory()` | not pinned | pinning needs CUDA |
| tensor type names | `Tensor.type()` | `torch.cuda.*Tensor` | gradient clipping and the optimizers compare it |
| presence | `torch.cuda.is_available`, `is_initialized`, `device_count` | yes; LOCAL_WORLD_SIZE | asserted, local ranks |
| current device | `torch.cuda.current_device`, `set_device`, `device` | CPU; no-op | `device=current_device()` |
| properties | `get_device_properties`, `_capability`, `_name` | those of an 8.0 device called cpu | read, never used |
| streams, events | `Stream`, `Event`, `stream`, `*_stream`, `synchronize` | no-ops | CPU work is in order already |
| random state | `get_/set_rng_state`, `manual_seed*`, `default_generators`, `_lazy_*` | the CPU generator | RNG tracker |
| memory figures | `memory_*`, `max_memory_*`, `*_peak_*`, `empty_cache`, `device_memory_used` | 0 | no allocator |
| NVTX | `torch.cuda.nvtx.range_push/pop` | no-ops | no profiler |
| accelerator | `torch.accelerator.is_available` | no | there is none |
| process group | `torch.distributed.init_process_group` | without `device_id` | gloo takes none |
| data loader | `torch.utils.data.DataLoader.__init__` | `pin_memory=False` | pinning needs CUDA |
| optimizer checks | `Optimizer._cuda_graph_capture_health_check` and its twin | no-ops | ask CUDA at each step |
| compile | `torch.compiler.set_stance` | force_eager | fusions are compiled for CUDA speed |
| RNG tracker imports | `megatron.core.tensor_parallel.random._lazy_call` … | run at once | names bound at import |
| token counts of experts | `token_dispatcher.maybe_move_tensor_to_cpu` | made numpy where asked | a tensor of a CPU is left as it is, and all-to-all takes no tensor |
| GPU packages | `import transformer_engine`, `apex`, `amp_C` … | absent | Megatron takes their CUDA kernels where it finds them (clip_grads, optimizers) |
| norm, attention | `LocalSpecProvider`, `LNImpl`, `LayerNormImpl` | `megatron_dft.cpu.layers` | SP, thd and CP |

Source of the requirements: megatron-core 0.19.2 (training/, core/) read and run on CPU.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatron_dft.cpu.stand_ins import (
    CPU,
    CpuMode,
    Event,
    Generators,
    Stream,
    call_now,
    nothing,
    on_host,
    without,
    zero,
)

# Packages of CUDA kernels that Megatron prefers to its own code wherever they can be imported.
GPU_PACKAGES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
    "flash_attn",
)


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) for each row of the module's table."""
    cuda = torch.cuda
    generator = torch.default_generator
    properties = SimpleNamespace(
        major=8, minor=0, total_memory=0, name="cpu", multi_processor_count=1
    )
    get_rng = without(torch.get_rng_state)
    rng: dict[str, Any] = {
        "get_rng_state": lambda *a, **k: get_rng(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
    }
    names: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: CPU,
        "set_device": nothing,
        "device": lambda *a, **k: contextlib.nullcontext(),
        "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: (8, 0),
        "get_device_name": lambda *a: "cpu",
        "Stream": Stream,
        "Event": Event,
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "current_stream": lambda *a, **k: Stream(),
        "default_stream": lambda *a, **k: Stream(),
        "set_stream": nothing,
        "synchronize": nothing,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: generator.manual_seed(seed) and None,
        "manual_seed_all": nothing,
        "default_generators": Generators(),
        "_lazy_init": nothing,
        "_lazy_call": call_now,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "device_memory_used": zero,
        "memory_stats": lambda *a, **k: {},
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        **rng,
    }
    rows: list[tuple[Any, str, Any]] = [(cuda, name, value) for name, value in names.items()]
    rows += [(cuda.random, name, value) for name, value in rng.items()]
    rows += [(cuda.nvtx, "range_push", nothing), (cuda.nvtx, "range_pop", nothing)]
    rows += [(torch.accelerator, "is_available", lambda: False)]

    dist = torch.distributed
    rows += [(dist, "init_process_group", without(dist.init_process_group, "device_id"))]
    loader = torch.utils.data.DataLoader
    rows += [(loader, "__init__", without(loader.__init__, pin_memory=False))]
    for check in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):
        # torch renamed the first into the second over the supported releases.
        if hasattr(torch.optim.Optimizer, check):
            rows += [(torch.optim.Optimizer, check, nothing)]

    import megatron.core.tensor_parallel.random as mcore_random

    rows += [
        (mcore_random, "_lazy_call", call_now),
        (mcore_random, "_lazy_init", nothing),
        (mcore_random, "device_ctx_manager", lambda *a, **k: contextlib.nullcontext()),
    ]

    from megatron.core.transformer.moe import token_dispatcher

    rows += [(token_dispatcher, "maybe_move_tensor_to_cpu", on_host)]

    from megatron_dft.cpu import layers

    return rows + layers.replacements()


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Make `import` of these packages fail as where they are not installed.

    Raises RuntimeError where Megatron has bound their functions already.
    """
    if "megatron.core.optimizer.clip_grads" in sys.modules:
        bound = [n for n in ("transformer_engine", "amp_C") if sys.modules.get(n) is not None]
        if bound:
            raise RuntimeError(
                f"the CPU runtime cannot start: Megatron was imported before it and has taken the "
                f"CUDA kernels of {bound[0]}"
            )
    kept = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)


class _State:
    saved: list[tuple[Any, str, Any]] = []
    modes: contextlib.ExitStack | None = None


def is_active() -> bool:
    """Whether the CPU runtime stands in for CUDA in this process."""
    return _State.modes is not None


def activate() -> None:
    """Replace what the module's table lists. Idempotent.

    Raises:
        RuntimeError: a GPU is in use already, or an attribute of the table is not there any more.
    """
    if is_active():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("the CPU runtime cannot start: CUDA is initialised in this process")
    with contextlib.ExitStack() as modes:
        modes.enter_context(_hidden(GPU_PACKAGES))  # before the table imports Megatron
        rows = _replacements()
        missing = [
            f"{owner.__name__}.{name}" for owner, name, _ in rows if not hasattr(owner, name)
        ]
        if missing:
            raise RuntimeError(
                "the CPU runtime does not know this torch or megatron-core release; missing: "
                f"{missing}"
            )
        _State.saved = [(owner, name, getattr(owner, name)) for owner, name, _ in rows]
        for owner, name, value in rows:
            setattr(owner, name, value)
        modes.enter_context(torch.compiler.set_stance("force_eager"))
        modes.enter_context(CpuMode())
        _State.modes = modes.pop_all()


def deactivate() -> None:
    """Put everything back as it was before `activate()`. Idempotent."""
    if _State.modes is None:
        return
    _State.modes.close()
    for owner, name, value in reversed(_State.saved):
        setattr(owner, name, value)
    _State.saved, _State.modes = [], None
