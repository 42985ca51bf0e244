"""Write a Hugging Face model directory so that a killed process leaves nothing that looks whole.

Everything goes into a hidden directory beside the target; config.json and the weight index come
last; then files and directory are flushed and the directory is renamed into place.
"""

import ctypes
import json
import os
import shutil
from pathlib import Path

import torch

from megatron_dft.hf import companions, links
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.files import flush
from megatron_dft.storage.model_files import INDEX
from megatron_dft.storage.safetensors import StoredTensor, read_header


def target(out_dir: str | Path) -> Path:
    """Where an export given as `out_dir` stands: a link is followed, not replaced."""
    return Path(os.path.realpath(out_dir))


def staging_path(out_dir: Path) -> Path:
    return out_dir.parent / f".{out_dir.name}.incomplete"


def _replaced_path(out_dir: Path) -> Path:
    return out_dir.parent / f".{out_dir.name}.replaced"


def heal(out_dir: Path) -> None:
    """Undo what a kill between the two renames of `_replace` left: the old directory comes back.

    A kill behind them left the old directory to be deleted.
    """
    old = _replaced_path(target(out_dir))
    if not old.is_dir() or old.is_symlink():
        return
    if target(out_dir).exists():
        shutil.rmtree(old)
    else:
        os.rename(old, target(out_dir))
        flush(old.parent)


def start(checkpoint: HFCheckpoint, out_dir: Path, overwrite: bool) -> Path:
    """Make the staging directory, mending what a killed export left there; returns its path.

    Raises ValueError when `out_dir` exists with something in it and `overwrite` is off, when it is
    a file, or when it is the base checkpoint itself; and as `companions.check`.
    """
    companions.check(checkpoint)
    heal(out_dir)
    if out_dir.exists():
        if not out_dir.is_dir():
            raise ValueError(f"{out_dir}: is a file; name a directory")
        if out_dir.resolve() == checkpoint.path.resolve():
            raise ValueError(f"{out_dir}: is the base model; name another directory")
        if any(out_dir.iterdir()) and not overwrite:
            raise ValueError(
                f"{out_dir}: exists and is not empty; name another directory or pass --overwrite"
            )
    staging = staging_path(out_dir)
    if staging.is_symlink():
        staging.unlink()
    elif staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def finish(
    checkpoint: HFCheckpoint,
    staging: Path,
    out_dir: Path,
    files: list[str],
    *,
    dtype: torch.dtype | None,
    card: str | None,
    chat: companions.TrainedChat | None = None,
) -> None:
    """Check the weight files, add everything else, flush, rename `staging` to `out_dir`.

    files: names of the safetensors files in `staging`, closed and flushed. chat: what the answers
    were trained with; None where nothing was. Raises ValueError when the files do not hold every
    tensor of the base checkpoint in its shape.
    """
    written: dict[str, StoredTensor] = {}
    for file in files:
        written.update(read_header(staging / file))
    _compare(checkpoint, written)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in written.values())},
            "weight_map": {n: t.file.name for n, t in sorted(written.items())},
        }
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    companions.write(checkpoint, staging, chat)
    if card is not None:
        (staging / "README.md").write_text(card, encoding="utf-8")
    _write_config(checkpoint, staging, dtype)
    publish(staging, out_dir)


def discard(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out_dir: Path) -> None:
    """Flush all but the weight files (flushed as they were closed) and rename into place."""
    for path in [*staging.rglob("*"), staging]:
        if path.suffix not in (".safetensors", ".distcp"):
            flush(path)
    _replace(staging, out_dir)


def _compare(checkpoint: HFCheckpoint, written: dict[str, StoredTensor]) -> None:
    from megatron_dft.hf.families import optional_tensors

    optional = optional_tensors(checkpoint)
    for name, info in checkpoint.tensors.items():
        if name not in written:
            if name not in optional:
                raise ValueError(f"export: tensor {name!r} was not written")
        elif written[name].shape != info.shape:
            raise ValueError(
                f"export: tensor {name!r} was written as {list(written[name].shape)}, the base "
                f"model has {list(info.shape)}"
            )


def _write_config(checkpoint: HFCheckpoint, staging: Path, dtype: torch.dtype | None) -> None:
    if dtype is None:
        links.copy(checkpoint.path, checkpoint.path / "config.json", staging / "config.json")
        return
    config = dict(checkpoint.config)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix(
        "torch."
    )
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _replace(staging: Path, out_dir: Path) -> None:
    if out_dir.exists() and any(out_dir.iterdir()):
        if _exchange(staging, out_dir):
            shutil.rmtree(staging)  # now the old directory
        else:  # a file system without the exchange: for a moment no directory of that name exists
            old = _replaced_path(out_dir)
            os.rename(out_dir, old)
            os.rename(staging, out_dir)
            shutil.rmtree(old)
    else:
        os.rename(staging, out_dir)
    flush(out_dir.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
