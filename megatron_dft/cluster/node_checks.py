"""What `megatron-dft preflight` asks of one node: figures, and complaints where they are bad."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "megatron-dft")
_WRITTEN = 64 << 20  # bytes


def versions() -> dict[str, str]:
    """name → version of what has to be the same on every node."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def apex() -> str | None:
    """What is wrong with an installed `apex`: PyPI's package of that name is not NVIDIA's."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec("amp_C") is not None:
        return None
    return "`apex` is not NVIDIA's (no amp_C): pip uninstall apex"


def gpus(expected: int) -> tuple[int, list[str]]:
    """(number seen, complaints): each GPU multiplies two matrices, and the sum has to be right."""
    seen = torch.cuda.device_count()
    wrong = [] if seen >= expected else [f"{seen} GPUs, expected {expected}"]
    for index in range(seen):
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{index}", dtype=torch.bfloat16)
            if float((ones @ ones).float().sum()) != 1024.0**3:
                wrong.append(f"GPU {index} multiplies wrongly")
            free, _ = torch.cuda.mem_get_info(index)
            if free < 0.9 * torch.cuda.get_device_properties(index).total_memory:
                wrong.append(f"GPU {index} has only {free / 1e9:.0f} GB free")
        except RuntimeError as error:
            wrong.append(f"GPU {index}: {str(error).splitlines()[0]}")
    return seen, wrong


def disk(directory: Path, need_gb: float) -> tuple[float, float, list[str]]:
    """(GB free, MB/s written and synced, complaints) of the save path."""
    path = directory / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free / 1e9
        began = time.monotonic()
        with path.open("wb") as file:
            file.write(bytes(_WRITTEN))
            file.flush()
            os.fsync(file.fileno())
        speed = _WRITTEN / 1e6 / (time.monotonic() - began)
    except OSError as error:
        return 0.0, 0.0, [f"{directory}: {error.strerror}"]
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    short = [f"{directory}: {free:.1f} GB free, {need_gb:g} needed"] if free < need_gb else []
    return free, speed, short


def unreadable(training: list[str]) -> list[str]:
    """Files that the training flags name and this node cannot read."""
    wrong, flag = [], ""
    for word in training:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
        if flag not in ("--hf-model", "--train-data", "--valid-data") or not word:
            continue
        path = Path(word.split(":", 1)[-1] if ":" in word else word)
        if flag != "--hf-model" and not path.suffix and not path.is_absolute():
            if not path.exists() and len(path.parts) == 2:
                continue  # a data set of the hub
        if flag == "--hf-model":
            # A name without a directory is the hub's.
            path = path / "config.json" if path.is_dir() or path.is_absolute() else Path("/")
        if not os.access(path, os.R_OK):
            wrong.append(f"{flag}: {path} cannot be read")
    return wrong


def check(run_dir: Path, procs: int, need_gb: float, training: list[str]) -> dict[str, Any]:
    """All of this node's figures, and its complaints under `wrong` and `unreadable`."""
    on_cpu = "cpu" in training or "--device=cpu" in training
    seen, wrong = gpus(0 if on_cpu else procs)
    free, speed, short = disk(run_dir, need_gb)
    bad_apex = apex()
    return {
        "host": socket.gethostname(),
        "gpus": seen,
        "free": free,
        "speed": speed,
        "versions": versions(),
        "wrong": [*wrong, *short, *([bad_apex] if bad_apex else [])],
        "unreadable": unreadable(training),
    }
