"""Find a Hugging Face checkpoint, refuse what is unsafe or broken, and index its tensors by name.

Nothing of the model is read here but config.json and the headers of the safetensors files.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_dft.storage.files import read_json_object
from megatron_dft.storage.model_files import read_directory
from megatron_dft.storage.safetensors import StoredTensor

_MOST_LAYERS = 10_000  # where the files' headers do not say
# What an import needs; `original/`, `.bin`, ONNX and GGUF copies of the weights stay on the hub.
_HUB_PATTERNS = [
    "*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


@dataclass(frozen=True)
class HFCheckpoint:
    """A Hugging Face checkpoint on disk.

    path      directory that holds config.json and the safetensors files
    name      what the user asked for: a directory or a hub name
    revision  commit the hub resolved it to, or None for a directory
    config    config.json as it stands
    tensors   name -> file, global shape, dtype, offset
    """

    path: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json with all defaults of transformers, rope in its current spelling."""
        _check_layers(self.path, self.config, len(self.tensors) or _MOST_LAYERS)
        return _resolve(self.path, self.config)


def _check_layers(path: Path, config: dict[str, Any], most: int) -> None:
    """Before transformers makes lists of so many words."""
    layers = config.get("num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= most:
        raise ValueError(
            f"{path}/config.json: num_hidden_layers: expected a whole number from 1 to {most} "
            f"(there are no more tensors), got {str(layers)[:40]}"
        )


def _resolve(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}/config.json: model_type {str(model_type)[:40]!r} is unknown to this "
            "transformers; expected a causal language model such as 'llama' or 'qwen2'"
        )
    try:
        resolved = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers raises whatever its validators raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}/config.json: transformers refuses it: {reason}") from None
    return resolved


def _fetch(name: str, revision: str | None, code: bool) -> tuple[Path, str | None]:
    """Download (or find in the cache) a hub repository; returns its directory and the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # a failure is reported once, by the caller
    patterns = [*_HUB_PATTERNS, "*.py"] if code else _HUB_PATTERNS
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--hf-model {name!r} is neither a directory nor a model that the hub gives (revision "
            f"{revision or 'main'}): {type(error).__name__}: {reason}. Give a directory with "
            "config.json and *.safetensors, or download it first (hf download NAME); without a "
            "network HF_HUB_OFFLINE=1 takes what the cache has and does not wait"
        ) from None
    return path, path.name  # the cache names a snapshot's directory after the commit


def _check_config(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    if "auto_map" in config and not trust_remote_code:
        raise ValueError(
            f"{path}/config.json asks to run Python code of its own (auto_map); nothing of it was "
            "run. Read that code and pass --trust-remote-code if you trust it"
        )
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and len(architectures) == 1
    if not (named and isinstance(architectures[0], str)):
        raise ValueError(
            f"{path}/config.json: 'architectures' must name one class such as 'LlamaForCausalLM', "
            f"got {str(architectures)[:80]}"
        )
    if config.get("transformers_weights"):
        raise ValueError(
            f"{path}/config.json names weights of its own ('transformers_weights': "
            f"{str(config['transformers_weights'])[:80]!r}), which is not read; name them "
            "model.safetensors and remove that entry"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{path}: the weights are quantised (quantization_config in config.json); give the "
            "unquantised checkpoint, or dequantise it and remove that entry"
        )


def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> HFCheckpoint:
    """Open a Hugging Face checkpoint: a directory, or a hub name at `revision` (branch, tag,
    commit).

    HF_HUB_OFFLINE and HF_HOME mean what they mean to huggingface_hub. Raises ValueError in one line
    when it is not found, config.json is malformed or asks for remote code, the weights are pickled,
    quantised, truncated or incomplete, or the index names a file elsewhere. Reads no tensor data.

    >>> open_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct").architecture  # doctest: +SKIP
    'LlamaForCausalLM'
    """
    path, commit = Path(name_or_path), None
    if not path.is_dir():
        path, commit = _fetch(os.fspath(name_or_path), revision, trust_remote_code)
    elif revision is not None:
        raise ValueError(f"--hf-revision {revision}: {path} is a directory, which has no revisions")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json; expected a Hugging Face model directory")
    config = read_json_object(path / "config.json")
    _check_config(path, config, trust_remote_code)
    return HFCheckpoint(path, os.fspath(name_or_path), commit, config, read_directory(path))
