"""Which characters of an assistant turn the chat template wrote, and which came from the row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_dft.data.template import REASONING_NAMES, Span

# What a template may put in its own words: <think>, [/THINK], ◁think▷, and the ends of lines.
_CUTS = re.compile(r"</?\w+>|\[/?[A-Z_]+\]|◁/?\w+▷|\n")
_WORD = re.compile(r"\w+")


def written(text: str, start: int, stop: int, message: Mapping[str, Any]) -> list[Span] | None:
    """The parts of text[start:stop], a turn without its end token, that the template wrote.

    They are what the message's reasoning, content, names and arguments leave over. None where one
    of these is not found as it stands: the template rewrote the turn, and none of it counts as
    written, for a token of the row must never be taken for one of the template.
    """
    if len(message) == 2:  # role and content alone, as nearly always
        content = message.get("content")
        if content and stop - start == len(content) and text.startswith(content, start):
            return []
    own: list[Span] = []
    at = start
    texts = list(_texts(message))
    for number, forms in enumerate(texts):
        last = number == len(texts) - 1
        found = next((s for f in forms if (s := _find(text, at, stop, f, last)) is not None), None)
        if found is None:
            return None
        own.append(found)
        at = found[1]
    gaps, at = [], start
    for begin, end in own:
        gaps.append((at, begin))
        at = end
    return [(a, b) for a, b in (*gaps, (at, stop)) if a < b]


def left_out(text: str, start: int, stop: int, content: str) -> str | None:
    """The first line of a content of which text[start:stop] lacks something; None where it has all.

    Some templates cut off what a content holds before </think>. Others only trim it, print its
    reasoning in their own words, or escape its quotes: then all of its words are there.
    """
    at, lost = start, None
    for line in map(str.strip, _CUTS.split(content)):
        found = text.find(line, at, stop)
        if found < 0:
            lost = line
            break
        at = found + len(line)
    if lost is None:
        return None
    words = Counter(_WORD.findall(_CUTS.sub(" ", content)))
    # A word may stand in another there (escaped line ends); to look for each of them is quadratic.
    whole = Counter(_WORD.findall(text, start, stop))
    missing = {
        word
        for word, count in words.items()
        if whole[word] < count and text.count(word, start, stop) < count
    }
    lines = (line.strip() for line in _CUTS.split(content))
    return next((line for line in lines if missing & set(_WORD.findall(line))), None)


def _texts(message: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The message's own texts in the order in which templates write them, each in its forms."""
    for name in REASONING_NAMES:
        if message.get(name, "").strip():
            yield _forms(message[name])
            break
    if (message.get("content") or "").strip():
        yield _forms(message["content"])
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield (function["name"],)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            yield (arguments, json.dumps(arguments, ensure_ascii=False))
        elif arguments is not None:
            yield (json.dumps(arguments, ensure_ascii=False), json.dumps(arguments, indent=4))


def _forms(text: str) -> tuple[str, ...]:
    return (text, text.strip())


def _find(text: str, start: int, stop: int, part: str, last: bool) -> Span | None:
    # The last one usually stands right before the end; a short one might be found too early.
    if last and text.endswith(part, start, stop):
        return stop - len(part), stop
    at = text.find(part, start, stop)
    return None if at < 0 else (at, at + len(part))
