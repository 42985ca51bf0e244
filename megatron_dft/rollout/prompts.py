"""Rows of a prompt file to prompts with a reference answer; a wrong row is counted by its kind."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dft.data.readers import Unreadable, read_batches
from megatron_dft.data.sources import Source, parse_sources

# field of a prompt → the columns that may hold it, the first present one counts.
COLUMNS = {
    "messages": ("messages",),
    "prompt": ("prompt", "question", "problem"),
    "answer": ("answer",),
}


@dataclass(frozen=True)
class Prompt:
    """number: the row's place among all rows, from 0; answer: any JSON value, None without one."""

    number: int
    messages: list[dict[str, Any]]
    answer: Any
    where: str

    def record(self) -> dict[str, Any]:
        return {
            "prompt": self.number,
            "messages": self.messages,
            "answer": self.answer,
            "where": self.where,
        }


@dataclass
class Skips:
    """What was left out: how many of each kind, and where the first of each kind is."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        self.first.setdefault(kind, where)

    def __str__(self) -> str:
        return "; ".join(f"{n:,} × {k} (first: {self.first[k]})" for k, n in self.counts.items())

    def record(self) -> dict[str, Any]:
        return {k: {"count": n, "first": self.first[k]} for k, n in self.counts.items()}


@dataclass(frozen=True)
class Shape:
    """How a row becomes a prompt: its columns, a system message, a template with `{prompt}`."""

    columns: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(COLUMNS))
    system: str | None = None
    template: str | None = None


class _Bad(ValueError):
    """The kind of mistake in a row."""


def parse_columns(items: Sequence[str], flag: str = "--columns") -> dict[str, tuple[str, ...]]:
    """`["prompt=question,problem", "answer=solution"]` to COLUMNS with these in place.

    A prompt column that is named wins over `messages`. Raises ValueError for anything else.
    """
    columns: dict[str, tuple[str, ...]] = dict(COLUMNS)
    for item in items:
        name, equals, value = item.partition("=")
        names = tuple(filter(None, value.split(",")))
        if not equals or name not in COLUMNS or not names:
            raise ValueError(
                f"{flag} {item!r}: expected one of {', '.join(COLUMNS)} with =COLUMN, for example "
                "prompt=question answer=solution"
            )
        columns[name] = names
        if name == "prompt" and not any(i.startswith("messages=") for i in items):
            columns["messages"] = ()
    return columns


def read_prompts(items: Sequence[str], shape: Shape, flag: str) -> tuple[list[Prompt], Skips]:
    """All prompts of the files, in order, and what was skipped.

    items: JSON lines or Parquet files, directories, or saved data sets, as for training. A last
    assistant message is no part of the prompt: it is the reference where no answer column is.
    Raises ValueError where a file cannot be read or no row can be used.
    """
    if shape.template is not None and "{prompt}" not in shape.template:
        raise ValueError(
            f"--prompt-template {shape.template!r}: expected {{prompt}} where the prompt goes"
        )
    prompts: list[Prompt] = []
    skips, number = Skips(), 0
    for source in parse_sources(items, flag):
        for row, where in _rows(source):
            try:
                messages, answer = _parse(row, shape)
                prompts.append(Prompt(number, messages, answer, where))
            except _Bad as error:
                skips.add(str(error), where)
            number += 1
    if not prompts:
        raise ValueError(f"{flag}: no row can be used: {skips}; see --columns")
    return prompts, skips


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of what is asked: numbers, messages, answers."""
    digest = hashlib.blake2b(digest_size=16)
    for p in prompts:
        digest.update(json.dumps([p.number, p.messages, p.answer], sort_keys=True).encode())
    return digest.hexdigest()


def _rows(source: Source) -> Iterator[tuple[Any, str]]:
    names = source.paths if source.kind == "files" else (source.name,)
    for batch in read_batches(source):
        for number, row in zip(batch.numbers, batch.rows, strict=True):
            yield row, f"{names[batch.file]}:{number}"


def _parse(row: Any, shape: Shape) -> tuple[list[dict[str, Any]], Any]:
    row = _decoded(row)
    answer = _first(row, shape.columns["answer"])
    asked = _first(row, shape.columns["messages"])
    if asked is None:
        asked = _first(row, shape.columns["prompt"])
    if asked is None:
        raise _Bad("row without a prompt column")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    messages = _messages(asked)
    if messages[-1]["role"] == "assistant":
        reference = messages.pop()["content"]
        answer = reference if answer is None else answer
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise _Bad("prompt that does not end with a user message")
    if answer is None and shape.columns["answer"] != COLUMNS["answer"]:
        raise _Bad("row without the answer column that --columns names")
    return _shaped(messages, shape), answer


def _decoded(row: Any) -> dict[str, Any]:
    if isinstance(row, Unreadable):
        raise _Bad("unreadable row")
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            raise _Bad("row that is not JSON") from None
    if not isinstance(row, Mapping):
        raise _Bad("row that is not an object")
    return dict(row)


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[n] for n in names if row.get(n) is not None), None)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _Bad("prompt that is neither text nor a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise _Bad("message that is not an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise _Bad("message without a role or without text")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise _Bad("message with a lone surrogate, which is no text") from None
        messages.append({"role": role, "content": content})
    return messages


def _shaped(messages: list[dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    if shape.template is not None:
        last = messages[-1]
        messages[-1] = {**last, "content": shape.template.replace("{prompt}", last["content"])}
    if shape.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": shape.system})
    return messages
