"""What stands beside the weights, so that an export, loaded by defaults, answers and stops.

Files of the base model go along as they are, but for two things that training decides: the chat
template that the answers were written with, and which tokens end them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dft.hf import links
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.storage.files import read_json_object

GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"

# Files of the base model that go with any weights derived from it.
_COPIED = (
    GENERATION,
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    _TEMPLATE,
    "chat_template.json",
    f"{_MORE_TEMPLATES}/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Beyond it no id is a 32-bit integer, as runtimes hold them.
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class TrainedChat:
    """What a run trained its answers with.

    templates   name → Jinja text ("default" among them) where they are not the base's own as they
                stand: --chat-template, or variables fixed by --chat-template-args; None otherwise
    end_tokens  ids that end a trained turn; empty: nothing is known of them
    """

    templates: Mapping[str, str] | None = None
    end_tokens: tuple[int, ...] = ()


def check(checkpoint: HFCheckpoint) -> None:
    """Raise ValueError, before anything is trained or written, for files that no export can be made
    of: damaged settings, links out of the model."""
    for file in [*copied_files(checkpoint), checkpoint.path / "config.json"]:
        links.check(checkpoint.path, file)
    _base_generation(checkpoint)
    if (checkpoint.path / _TOKENIZER_CONFIG).is_file():
        read_json_object(checkpoint.path / _TOKENIZER_CONFIG)


def write(checkpoint: HFCheckpoint, target: Path, chat: TrainedChat | None) -> None:
    """Put all of them but config.json into the directory `target`; raises as `check` does."""
    for file in copied_files(checkpoint):
        copied = target / file.relative_to(checkpoint.path)
        copied.parent.mkdir(exist_ok=True)
        links.copy(checkpoint.path, file, copied)
    if chat is None:
        return
    if chat.templates is not None:
        _write_templates(chat.templates, target)
    found = generation_config(checkpoint, chat.end_tokens)
    if found is not None:
        _write_json(target / GENERATION, found)


def generation_config(
    checkpoint: HFCheckpoint, end_tokens: tuple[int, ...]
) -> dict[str, Any] | None:
    """The base's generation_config.json with `end_tokens` among its eos_token_id, and none of them
    suppressed.

    The base's own stay, in front: a base model ends a document with them. None where nothing has to
    change. Without the file transformers takes the ids of config.json, and so do we.
    """
    settings, ends = _base_generation(checkpoint)
    missing = [token for token in end_tokens if token not in ends]
    found = {**settings, **_unsuppressed(settings, end_tokens)}
    if missing:
        ends = [*ends, *missing]
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return None if found == settings else found


def _unsuppressed(settings: dict[str, Any], end_tokens: tuple[int, ...]) -> dict[str, Any]:
    """The settings that forbid tokens, those of them changed that forbid an end token."""
    ends: list[Any] = [*end_tokens, *([token] for token in end_tokens)]  # bad_words_ids has lists
    changed: dict[str, Any] = {}
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        listed = settings.get(name)
        if isinstance(listed, list):
            kept = [one for one in listed if one not in ends]
            if kept != listed:
                changed[name] = kept or None
    return changed


def _base_generation(checkpoint: HFCheckpoint) -> tuple[dict[str, Any], list[int]]:
    """(generation settings, the ids that end a text) of the base."""
    file = checkpoint.path / GENERATION
    if file.is_file():
        settings = read_json_object(file)
        return settings, _ids(settings.get("eos_token_id"), file)
    config = checkpoint.config
    settings = {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config
    }
    return settings, _ids(config.get("eos_token_id"), checkpoint.path / "config.json")


def _ids(value: Any, file: Path) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= _LARGEST_ID:
            raise ValueError(
                f"{file}: eos_token_id: expected a token id or a list of them, got "
                f"{_short(value)}; mend the file"
            )
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _brings_code(checkpoint: HFCheckpoint) -> bool:
    """Whether config.json or the tokenizer names Python code beside it (auto_map)."""
    if "auto_map" in checkpoint.config:
        return True
    file = checkpoint.path / _TOKENIZER_CONFIG
    return file.is_file() and "auto_map" in read_json_object(file)


def copied_files(checkpoint: HFCheckpoint) -> list[Path]:
    """What is copied from the base model."""
    patterns = (*_COPIED, "*.py") if _brings_code(checkpoint) else _COPIED
    return [f for pattern in patterns for f in checkpoint.path.glob(pattern) if f.is_file()]


def _write_templates(templates: Mapping[str, str], target: Path) -> None:
    """In the one form that transformers reads first, and no other beside it to contradict them."""
    shutil.rmtree(target / _MORE_TEMPLATES, ignore_errors=True)
    (target / "chat_template.json").unlink(missing_ok=True)
    for name, text in templates.items():
        file = target / _TEMPLATE
        if name != "default":
            file = target / _MORE_TEMPLATES / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="")
    config = target / _TOKENIZER_CONFIG
    if config.is_file():
        settings = read_json_object(config)
        # Programs that know only this place are to find the template too, where there was one.
        if settings.pop("chat_template", None) is not None:
            settings["chat_template"] = _as_entry(templates)
        _write_json(config, settings)


def _as_entry(templates: Mapping[str, str]) -> Any:
    """tokenizer_config.json's form: a text, or a list of named ones."""
    if templates.keys() == {"default"}:
        return templates["default"]
    return [{"name": name, "template": text} for name, text in templates.items()]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
