"""Find a Hugging Face checkpoint, refuse what is unsafe or broken, and index its tensors by name.

Nothing of the model is read here but config.json and the headers of the safetensors files.
"""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_dft.storage.safetensors import TensorInfo, read_header

_INDEX = "model.safetensors.index.json"
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
    tensors: dict[str, TensorInfo] = field(repr=False)

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json with all defaults of transformers, rope in its current spelling."""
        return _resolve(self.path, self.config)


def _resolve(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}/config.json: model_type {model_type!r} is unknown to this transformers; "
            "expected a causal language model such as 'llama' or 'qwen2'"
        )
    try:
        resolved = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception as error:  # transformers raises whatever its validators raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}/config.json: transformers refuses it: {reason}") from None
    return resolved


def read_json(file: Path) -> Any:
    """Raises ValueError in one line for a file that is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from None


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
            "config.json and *.safetensors, or download it first (hf download NAME)"
        ) from None
    return path, path.name  # the cache names a snapshot's directory after the commit


def _check_config(path: Path, config: Any, trust_remote_code: bool) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{path}/config.json: expected a JSON object")
    if "auto_map" in config and not trust_remote_code:
        raise ValueError(
            f"{path}/config.json asks to run Python code of its own (auto_map); nothing of it was "
            "run. Read that code and pass --trust-remote-code if you trust it"
        )
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1):
        raise ValueError(
            f"{path}/config.json: 'architectures' must name one class such as 'LlamaForCausalLM', "
            f"got {architectures!r}"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"{path}: the weights are quantised (quantization_config in config.json); give the "
            "unquantised checkpoint, or dequantise it and remove that entry"
        )


def _index(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> place, from the index or the single file; see `open_checkpoint` for errors."""
    if (path / _INDEX).exists():
        weight_map = read_json(path / _INDEX)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path}/{_INDEX}: has no 'weight_map'")
        files = sorted({str(f) for f in weight_map.values()})
        for file in files:
            if os.path.basename(file) != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path}/{_INDEX} names the file {file!r}; only *.safetensors files beside the "
                    "index are read"
                )
    elif (path / "model.safetensors").exists():
        files, weight_map = ["model.safetensors"], None
    else:
        pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(
            p.name for p in path.glob("*.pt*")
        )
        if pickled:
            raise ValueError(
                f"{path}: only pickled weights ({pickled[0]}), which can run code when loaded; not "
                "read. Convert them where that is safe: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) writes safetensors"
            )
        raise ValueError(f"{path}: no model.safetensors and no {_INDEX}; is the download complete?")
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not (path / file).is_file():
            raise ValueError(f"{path}/{_INDEX} names {file}, which is missing; fetch it again")
        for name, info in read_header(path / file).items():
            if name in found:
                raise ValueError(
                    f"{path}: tensor {name!r} is in {found[name].file.name} and {file}"
                )
            found[name] = info
    if weight_map is not None:
        # A name that lies in no file at all may be one that no parameter is made of: whoever needs
        # it says that it is missing.
        for name, file in weight_map.items():
            if name in found and found[name].file.name != file:
                raise ValueError(
                    f"{path}/{_INDEX}: expected tensor {name!r} in {file}, it is in "
                    f"{found[name].file.name}; fetch the files again"
                )
    return found


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
    config = read_json(path / "config.json")
    _check_config(path, config, trust_remote_code)
    return HFCheckpoint(path, os.fspath(name_or_path), commit, config, _index(path))
