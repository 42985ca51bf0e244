"""What makes a resumed run the same run: its loss, model and tokenizer.

The data has a fingerprint of its own (data/fingerprint.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_dft.arguments import settings
from megatron_dft.data.reference_scores import ReferenceScores

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# They say who wrote the file and how, not what the model is.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")


def run_identity() -> dict[str, Any]:
    """JSON values by the names that --allow-change takes; the same on every rank."""
    chosen = settings()
    identity: dict[str, Any] = {"loss": {"name": chosen.objective.name, **chosen.objective.values}}
    if chosen.reference_scores is not None:
        scores = ReferenceScores(chosen.reference_scores)
        identity["loss"]["reference_scores"] = scores.header["sha256"]
    if chosen.checkpoint is not None:
        path = chosen.checkpoint.path
        identity["model"] = _model(path)
        identity["tokenizer"] = _hashes(path)
    return json.loads(json.dumps(identity))


def _model(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if name not in _NOT_THE_MODEL}


def _hashes(directory: Path) -> dict[str, str]:
    found = {}
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            with (directory / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return found
