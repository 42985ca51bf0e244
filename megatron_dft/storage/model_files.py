"""The safetensors files of a Hugging Face model directory, and what they hold together."""

import os
from pathlib import Path

from megatron_dft.storage.files import read_json
from megatron_dft.storage.safetensors import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"


def read_directory(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory: of the files that its index names, of model.safetensors, or
    of whatever *.safetensors there are.

    Raises ValueError (one line) where there are none, the index names a file elsewhere or a missing
    one or a tensor that is in another file, a tensor is in two files, or a file is damaged.
    """
    files, weight_map = _shards(path)
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, info in read_header(path / file).items():
            if name in found:
                raise ValueError(
                    f"{path}: tensor {name!r} is in two shards, {found[name].file.name} and "
                    f"{file}; remove the stale one"
                )
            found[name] = info
    # A name that lies in no file may be a buffer that no parameter is made of: whoever needs the
    # tensor says that it is missing.
    for name, file in weight_map.items():
        if name in found and found[name].file.name != file:
            raise ValueError(f"{path / INDEX}: tensor {name!r} is not in {file}; fetch both again")
    return found


def _shards(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the files, and the index's weight_map ({} without an index)."""
    if (path / _ADAPTER).is_file():  # transformers would load its base and it, and not these files
        raise ValueError(
            f"{path} holds an adapter ({_ADAPTER}), not a model alone; merge it into its base, or "
            f"remove {_ADAPTER} where it is stale"
        )
    if (path / INDEX).is_file():
        files, weight_map = _indexed(path, path / INDEX)
        if (path / _SINGLE).is_file() and _SINGLE not in files:  # which transformers would take
            raise ValueError(
                f"{path} holds two models: {_SINGLE}, and the files that {INDEX} names; remove the "
                "stale ones"
            )
        return files, weight_map
    if (path / _SINGLE).is_file():
        return [_SINGLE], {}
    files = sorted(file.name for file in path.glob("*.safetensors") if file.is_file())
    if any(name.startswith("adapter_") for name in files):
        raise ValueError(f"{path} holds an adapter, not a model; merge it into its base first")
    if files:
        return files, {}
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise ValueError(
            f"{path} holds pickled weights only ({pickled[0]}), which are never read: loading runs "
            "code. Convert them where that is safe: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) writes safetensors"
        )
    raise ValueError(
        f"{path} holds no *.safetensors: no {_SINGLE} and no {INDEX}; is the download complete?"
    )


def _indexed(path: Path, index: Path) -> tuple[list[str], dict[str, str]]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(weight_map, dict) and weight_map) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(f"{index} has no readable weight_map; fetch it again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if os.path.basename(file) != file or "\0" in file:
            raise ValueError(f"{index} names {file!r}, which is no file of its directory")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {file!r}; only *.safetensors files are read")
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise ValueError(
            f"{index} names {missing[0]}, which is missing: {len(missing)} of {len(files)} shards "
            f"are missing ({', '.join(missing[:3])}); finish the download or copy"
        )
    return files, weight_map
