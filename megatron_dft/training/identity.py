"""What makes a resumed run the same run: its loss, model and tokenizer.

The data has a fingerprint of its own (data/fingerprint.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_dft.compat.checkpointing import checkpoint_exists
from megatron_dft.data.reference_scores import ReferenceScores
from megatron_dft.flags.settings import settings
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.dtypes import trained_word
from megatron_dft.storage.files import read_json_object, sha256_of_file
from megatron_dft.storage.torch_dist import read_tracker

# Of each weight file this many blocks of this many bytes are read to tell one model from another.
_BLOCKS, _BLOCK_BYTES = 32, 1 << 16
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# They say who wrote the file and how, not what the model is.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")


def run_identity() -> dict[str, Any]:
    """JSON values by the names that --allow-change takes; the same on every rank."""
    chosen = settings()
    identity: dict[str, Any] = {
        "loss": {"name": chosen.objective.name, **chosen.objective.settings}
    }
    if chosen.full_weight:  # absent where none do, as in what earlier runs have recorded
        identity["loss"]["full_weight"] = chosen.full_weight
    if chosen.weighs_normalizer:
        identity["loss"]["normalizer"] = "weights"
    if chosen.reference_scores is not None:
        scores = ReferenceScores(chosen.reference_scores)
        identity["loss"]["reference_scores"] = scores.header["sha256"]
    weights: dict[Path, str] = {}
    for checkpoint in (chosen.checkpoint, chosen.reference_checkpoint):
        if checkpoint is not None and checkpoint.path not in weights:
            weights[checkpoint.path] = _sample(checkpoint, hashlib.sha256())
    if chosen.reference_checkpoint is not None:
        identity["loss"]["reference_weights"] = weights[chosen.reference_checkpoint.path]
    if chosen.checkpoint is not None:
        path = chosen.checkpoint.path
        # Whether or not the weights are read again: they are where the run began.
        identity["model"] = _model(path) | {"weights": weights[path]}
        identity["tokenizer"] = _hashes(path)
    return json.loads(json.dumps(identity))


def _sample(checkpoint: HFCheckpoint, found: Any) -> str:
    """What tells weights from others, without reading them all; `found`: a hash, changed."""
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(size // _BLOCKS, 1)):
                file.seek(place)
                found.update(file.read(_BLOCK_BYTES))
    return found.hexdigest()[:32]


def _model(directory: Path) -> dict[str, Any]:
    config = read_json_object(directory / "config.json")
    return {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}


def _hashes(directory: Path) -> dict[str, str]:
    found = {}
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            found[name] = sha256_of_file(directory / name)[:32]
    return found


def model_identity(args: Any) -> dict[str, Any]:
    """What is scored: equal for equal weights and dtype, but for its `name`."""
    dtype = trained_word(args)
    if checkpoint_exists(args.load):
        step = args.ckpt_step or read_tracker(Path(args.load))
        return {"name": args.load, "weights": f"{Path(args.load).resolve()} at {step}",
                "dtype": dtype}  # fmt: skip
    checkpoint = settings().checkpoint
    assert checkpoint is not None
    found = _sample(checkpoint, hashlib.sha256((checkpoint.path / "config.json").read_bytes()))
    revision = "" if checkpoint.revision is None else f"@{checkpoint.revision}"
    return {"name": checkpoint.name + revision, "weights": found, "dtype": dtype}
