"""What a run's sample order depends on: kept beside its checkpoints, compared at a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dft.storage.files import read_json_object, write_whole

FILE_NAME = "megatron_dft_data.json"

# Where each difference comes from, in the user's words.
_FLAGS = {
    "weights": "the weights of --train-data",
    "mixture": "caps and epochs of --train-data",
    "valid_share": "--valid-share",
    "held_out_part": "which part of --valid-share this is",
    "seed": "--seed",
    "seq_length": "--seq-length",
    "overlong": "--overlong",
    "packing": "packing (--no-packing)",
    "pack_granularity": "--context-parallel-size (packing granularity)",
    "content": "the content of the data",
    "kind": "the kind of the data",
    "format": "--data-format",
    "columns": "--columns",
    "mask_history": "--mask-history",
    "max_samples": "--max-samples",
    "shuffled": "--no-shuffle: shuffling",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "template_args": "--chat-template-args or the special tokens",
    "template_date": "--template-date",
    "chat_rewrites": "--chat-rewrites",
    "chat_drops": "--chat-drops",
    "version": "the tokenised format of this release",
}
# What follows from another setting and says nothing beside it.
_FOLLOWS = {"pack_granularity": "packing", "held_out_part": "valid_share"}


def record(directory: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
    """Writes a data set's `identity` into a checkpoint directory; the file is whole or absent."""
    write_whole(Path(directory) / FILE_NAME, json.dumps(identity, indent=1))


def check_resume(
    directory: str | os.PathLike[str], identity: Mapping[str, Any], allow_change: bool
) -> list[str]:
    """Compares a data set with the one that a checkpoint was trained on.

    Call it when training goes on in the middle of the data (consumed_train_samples > 0). A
    directory without a record (a checkpoint that was imported, not trained) is not compared.

    Returns the differences. Raises ValueError with all of them where there are
    any, unless allow_change (--allow-data-change): the samples already seen would not be those that
    the resumed order skips.
    """
    path = Path(directory) / FILE_NAME
    if not path.exists():
        return []
    try:
        saved = read_json_object(path)
        if not has_sources(saved):
            raise ValueError("it lists no sources")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not readable: {error}; delete it to resume") from None
    changes = differences(saved, identity)
    if changes and not allow_change:
        raise ValueError(
            f"the checkpoint in {str(directory)!r} was trained with other data settings: "
            f"{'; '.join(changes)}; restore them, or go on with --allow-data-change"
        )
    return changes


def has_sources(identity: Any) -> bool:
    """Whether what a file holds can be the identity of a data set."""
    sources = identity.get("sources") if isinstance(identity, dict) else None
    return isinstance(sources, list) and all(isinstance(source, dict) for source in sources)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that differs: what it is, what it was, what it is now."""
    names = {*saved, *current} - {"sources"}
    different = {name for name in names if saved.get(name) != current.get(name)}
    changes = [
        f"{_FLAGS.get(name, name)} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(different)
        if _FOLLOWS.get(name) not in different
    ]
    before, now = saved.get("sources", []), current.get("sources", [])
    if len(before) != len(now):
        changes.append(f"--train-data had {len(before)} items, has {len(now)}")
        return changes
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        where = f" (item {index + 1} of --train-data)" if len(now) > 1 else ""
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                a, b = _short(old.get(name)), _short(new.get(name))
                changes.append(f"{_FLAGS.get(name, name)}{where} was {a}, is {b}")
    return changes


def _short(value: Any) -> str:
    """Enough of a hash to tell two apart."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 32 else repr(value)
