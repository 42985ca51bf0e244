"""Loads the tokenizer of a run: a Hugging Face fast one, or a sentencepiece model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dft.data.sentencepiece_model import load_sentencepiece
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.tokenizer_backend import check_backend, no_dropout
from megatron_dft.data.tokenizer_growth import check_file

# Files that this process has compared with what transformers makes of them: a run loads its
# tokenizer three times, and a large one takes a while to look through. None: there is no file.
_found_right: set[tuple[str, int, int, int] | None] = set()


def load_tokenizer(
    path_or_name: str | os.PathLike[str],
    chat_template: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A transformers fast tokenizer that has a chat template.

    Args:
        path_or_name: a directory with tokenizer files, a sentencepiece `.model` file, or a hub
            name.
        chat_template: a Jinja file that replaces the tokenizer's own template; required with a
            `.model` file, which has none.

    Raises ValueError where the tokenizer is missing, slow, or has no template.
    """
    path = Path(path_or_name)
    if path.suffix == ".model":
        tokenizer = load_sentencepiece(path)
    else:
        tokenizer = load_as_it_is(
            path_or_name, revision=revision, trust_remote_code=trust_remote_code
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {str(path_or_name)!r} is {type(tokenizer).__name__}, which has no fast "
            "implementation; exact masks need one: convert it to tokenizer.json"
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {str(path_or_name)!r} has no chat template; give one with "
            "--chat-template FILE (Jinja)"
        )
    return tokenizer


def load_as_it_is(
    path_or_name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """transformers' tokenizer of a directory or a hub name, with or without a chat template.

    It gives the ids of its own tokenizer.json, the same at each call. Raises ValueError where it
    does not, or cannot be loaded.
    """
    from transformers import AutoTokenizer

    file = Path(path_or_name) / "tokenizer.json"
    status = file.stat() if file.is_file() else None
    version = status and (str(file), status.st_ino, status.st_size, status.st_mtime_ns)
    if version not in _found_right:
        check_file(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path_or_name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files raise whatever their reader meets
        raise ValueError(
            f"tokenizer {str(path_or_name)!r} cannot be loaded: {_first_line(error)}; give a "
            "directory with tokenizer.json, a sentencepiece .model file, or a hub name"
        ) from None
    if getattr(tokenizer, "is_fast", False):
        no_dropout(tokenizer.backend_tokenizer)
        if version not in _found_right:
            check_backend(tokenizer, Path(path_or_name))
        _found_right.add(version)
    return tokenizer


def encoder_spec(
    tokenizer: Any,
    *,
    template_args: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    rewrites: str = "per-turn",
    drops: str = "refuse",
) -> EncoderSpec:
    """What the tokenising workers need of a transformers fast tokenizer.

    template_args are the user's own variables for the template (`enable_thinking`, …);
    template_date fixes what `strftime_now` tells it, as YYYY-MM-DD.
    """
    template = tokenizer.chat_template
    templates = template if isinstance(template, Mapping) else {"default": template}
    if "default" not in templates:
        raise ValueError(
            f"the tokenizer's chat templates are {sorted(templates)}, none of them 'default'; give "
            "one with --chat-template FILE"
        )
    variables: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items()}
    # Verbatim prompt-completion rows begin as the tokenizer begins any text.
    first = tokenizer("a")["input_ids"][0]
    variables["add_bos"] = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    variables.update(template_args or {})
    return EncoderSpec(
        tokenizer_json=_bare(tokenizer.backend_tokenizer.to_str()),
        templates=dict(templates),
        variables=variables,
        date=template_date,
        rewrites=rewrites,
        drops=drops,
    )


def _bare(tokenizer_json: str) -> str:
    """What decides the ids of a rendered text, without what earlier calls left switched on.

    Special tokens come from the template, so the post-processor has nothing to add; but a
    byte-level one trims whitespace off the offsets, which would hide where a token starts.
    """
    layout = json.loads(tokenizer_json)
    layout.update(truncation=None, padding=None, post_processor=None)
    return json.dumps(layout, ensure_ascii=False)


def pad_token_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """The id that fills unused positions. Masks never look at it, so it may be eos's.

    vocab_size: rows of the embedding, where a pad token that was added later has none.
    """
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None and (vocab_size is None or int(value) < vocab_size):
            return int(value)
    return 0


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {str(path)!r} cannot be read: {error}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
