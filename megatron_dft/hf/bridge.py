"""--hf-bridge: architectures without a table of ours go through NVIDIA's megatron-bridge package.

Offline, both ways: `megatron-dft import` and `export` call its AutoBridge and then check what it
did. Training takes our tables alone: a bridge model brings layers of its own, which the losses and
layouts here have not been proven with; its torch_dist checkpoints are stock Megatron's to train.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from megatron_dft.compat import safe_load
from megatron_dft.hf import directory
from megatron_dft.hf.companions import TrainedChat
from megatron_dft.hf.compare import compare_bytes
from megatron_dft.hf.consumption import check_finite
from megatron_dft.hf.families import FAMILIES, REFUSED, family_of
from megatron_dft.hf.source import HFCheckpoint, open_checkpoint
from megatron_dft.storage.files import flush
from megatron_dft.storage.safetensors import Reader

CHOICES = ("auto", "table", "megatron-bridge")
INSTALL = (
    "pip install --no-deps megatron-bridge beside transformer-engine and the transformers release "
    "it asks for"
)


def add_argument(group: Any) -> None:
    group.add_argument(
        "--hf-bridge",
        choices=CHOICES,
        default="auto",
        help="who maps the weights: our table of the architecture, the megatron-bridge package, or "
        "(auto) the package where there is no table",
    )


def uses_bridge(checkpoint: HFCheckpoint, wanted: str) -> bool:
    """Whether `--hf-bridge WANTED` means megatron-bridge for this checkpoint.

    Raises ValueError when it does and the package is not installed, or when WANTED is table and
    there is none.
    """
    mapped = checkpoint.architecture in FAMILIES
    if wanted == "table" or (wanted == "auto" and mapped):
        family_of(checkpoint)
        return False
    if is_installed():
        return True
    if wanted == "megatron-bridge":
        raise ValueError(f"--hf-bridge megatron-bridge: is not installed; {INSTALL}")
    why = REFUSED.get(checkpoint.architecture, "no table of ours maps it")
    raise ValueError(
        f"{checkpoint.path}: {checkpoint.architecture}: {why}; mapped are "
        f"{', '.join(sorted(FAMILIES))}. Others need megatron-bridge, which is not installed: "
        f"{INSTALL}"
    )


def is_installed() -> bool:
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


def check_training(wanted: str, checkpoint: HFCheckpoint) -> None:
    """Raise ValueError unless a table of ours maps the checkpoint that is trained."""
    if wanted == "megatron-bridge":
        raise ValueError(
            "--hf-bridge megatron-bridge: training takes our tables; convert the model with "
            "megatron-dft import --hf-bridge megatron-bridge and train it with stock Megatron "
            "(megatron-dft patch gives it --loss), or drop the flag"
        )
    family_of(checkpoint)


def _auto_bridge() -> Any:
    safe_load.install()  # it reads torch_dist through Megatron
    try:
        return importlib.import_module("megatron.bridge").AutoBridge
    except Exception as error:  # it imports transformer-engine and half of the ecosystem
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--hf-bridge: megatron-bridge is installed but cannot be imported: "
            f"{type(error).__name__}: {reason}; {INSTALL}"
        ) from None


def import_checkpoint(
    checkpoint: HFCheckpoint, out_dir: str | Path, *, overwrite: bool, trust_remote_code: bool
) -> Path:
    """Write `checkpoint` as megatron-bridge's torch_dist checkpoint; holds the model in memory.

    Every tensor is checked to be finite before, and after to come back from what was written, byte
    for byte and none missing or extra. Raises ValueError, and then nothing is left at `out_dir`.
    """
    auto_bridge, out = _auto_bridge(), directory.target(out_dir)
    check_all_finite(checkpoint)
    staging = directory.start(checkpoint, out, overwrite)
    trust = {"trust_remote_code": trust_remote_code}
    auto_bridge.import_ckpt(str(checkpoint.path), str(staging / "model"), **trust)
    bridge = auto_bridge.from_hf_pretrained(str(checkpoint.path), **trust)
    back = staging / "back"
    bridge.export_ckpt(str(staging / "model"), str(back), show_progress=False)
    compare_bytes(checkpoint, open_checkpoint(back, trust_remote_code=trust_remote_code))
    for file in (staging / "model").rglob("*.distcp"):
        flush(file)
    directory.publish(staging / "model", out)
    directory.discard(staging)
    return out


def export_checkpoint(
    checkpoint_dir: str | Path,
    checkpoint: HFCheckpoint,
    out_dir: str | Path,
    *,
    overwrite: bool,
    trust_remote_code: bool,
    card: str | None,
    chat: TrainedChat | None = None,
) -> Path:
    """Write what `import_checkpoint` made, trained since, as a Hugging Face directory.

    Raises ValueError when a tensor of the base model is missing, has another shape or holds NaN.
    """
    auto_bridge, out = _auto_bridge(), directory.target(out_dir)
    staging = directory.start(checkpoint, out, overwrite)
    bridge = auto_bridge.from_hf_pretrained(
        str(checkpoint.path), trust_remote_code=trust_remote_code
    )
    bridge.export_ckpt(str(checkpoint_dir), str(staging), show_progress=False)
    written = open_checkpoint(staging, trust_remote_code=trust_remote_code)
    check_all_finite(written)
    files = sorted({info.file.name for info in written.tensors.values()})
    for file in files:
        flush(staging / file)
    directory.finish(checkpoint, staging, out, files, dtype=None, card=card, chat=chat)
    return out


def check_all_finite(checkpoint: HFCheckpoint) -> None:
    """Raise ValueError naming the first tensor that holds NaN."""
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            for _, rows in reader.blocks(info, 0, info.shape[0] if info.shape else 1):
                check_finite(name, rows, checkpoint)
