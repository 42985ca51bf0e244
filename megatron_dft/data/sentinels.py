"""What of a conversation a chat template prints, found with words that no template writes.

The conversation's own texts are replaced by sentinels, it is rendered, and what does not come back
was dropped. Templates decide by roles, fields and their order, hardly by what a text says, so one
rendering serves all conversations of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dft.data.conversation import Conversation
from megatron_dft.data.template import REASONING_NAMES, TemplateError

# Renders (messages, tools) to the text of all samples together.
Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Any] | None], str]
_KEPT_SHAPES = 4096
_EMPTY: tuple[Any, ...] = (None, "", {})


def shape(conversation: Conversation) -> tuple[Any, ...]:
    """Equal for conversations whose texts alone differ."""
    trained = conversation.trained
    forms: list[Any] = [len(conversation.tools or ()), tuple(trained)]
    for message in conversation.messages[: trained[-1] + 1]:
        content = message.get("content")
        # In line, because nearly every message of every row is one of these.
        if len(message) == 2 and content and not content.isspace():
            forms.append(message["role"])
        else:
            forms.append(_form(message))
    return tuple(forms)


def _form(message: Mapping[str, Any]) -> Any:
    content = message.get("content", ...)
    if isinstance(content, str):
        content = not content or content.isspace()
    thinks = any(message.get(name, "").strip() for name in REASONING_NAMES)
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = _function(call).get("arguments")
        calls.append((type(arguments).__name__, arguments in _EMPTY))
    return (message["role"], content, thinks, *message, *calls)


class Expected(NamedTuple):
    """A sentinel, what it stands for, and which message it is in (None: the tools)."""

    word: str
    what: str
    message: int | None


class Sentinels:
    """A conversation with its texts replaced, and what must come back."""

    def __init__(self, conversation: Conversation) -> None:
        self.expected: list[Expected] = []
        last = conversation.trained[-1]
        self.messages = [
            self._replace(m, i, i in conversation.trained)
            for i, m in enumerate(conversation.messages[: last + 1])
        ]
        self.tools = conversation.tools
        if conversation.tools is not None:
            self.tools = [self._tool(t, i) for i, t in enumerate(conversation.tools)]

    def _expect(self, word: str, what: str, message: int | None) -> str:
        self.expected.append(Expected(word, what, message))
        return word

    def _replace(self, message: Mapping[str, Any], index: int, trains: bool) -> dict[str, Any]:
        role, replaced = message["role"], dict(message)
        if (message.get("content") or "").strip():
            what = "the content" if role == "assistant" else f"the {role} message"
            replaced["content"] = self._expect(f"Zq{index}cz", f"{what} (message {index})", index)
        if any(message.get(name, "").strip() for name in REASONING_NAMES):
            word = f"Zq{index}rz"
            replaced.update({n: word for n in REASONING_NAMES if n in message})
            if trains:  # of an answer that is context alone a template may drop it, as at inference
                self._expect(word, f"the reasoning (message {index})", index)
        if "tool_calls" in message:
            replaced["tool_calls"] = [
                self._call(call, index, number) for number, call in enumerate(message["tool_calls"])
            ]
        return replaced

    def _call(self, call: Mapping[str, Any], index: int, number: int) -> dict[str, Any]:
        what = f"tool call {number} (message {index})"
        function = dict(_function(call))
        function["name"] = self._expect(f"Zq{index}n{number}z", what, index)
        arguments = function.get("arguments")
        if arguments not in _EMPTY:
            word = self._expect(f"Zq{index}a{number}z", f"the arguments of {what}", index)
            if isinstance(arguments, str):
                function["arguments"] = '{"Zqkey": "' + word + '"}'
            elif isinstance(arguments, Mapping):
                function["arguments"] = {"Zqkey": word}
            else:
                function["arguments"] = word
        return {**call, "function": function} if "function" in call else function

    def _tool(self, tool: Mapping[str, Any], number: int) -> dict[str, Any]:
        function = _function(tool)
        if not isinstance(function.get("name"), str):
            return dict(tool)
        word = self._expect(f"Zqt{number}z", f"tool {number}", None)
        renamed = {**function, "name": word}
        return {**tool, "function": renamed} if "function" in tool else renamed


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI wraps a call or a tool in {"type", "function"}; others do not."""
    inner = call.get("function", call)
    return inner if isinstance(inner, Mapping) else {}


@dataclass(frozen=True)
class Lost:
    """What a template prints nowhere: parts in words; empty: trained turns it prints nothing of."""

    parts: tuple[str, ...] = ()
    empty: tuple[int, ...] = ()


class Drops:
    """Which parts of a conversation a template prints nowhere; each shape is tried once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Lost] = {}

    def of(self, conversation: Conversation, render: Render) -> Lost:
        """E.g. "the reasoning (message 1)"; nothing where all of it is printed."""
        key = shape(conversation)
        found = self._known.get(key)
        if found is None:
            found = _lost(conversation, render)
            if len(self._known) < _KEPT_SHAPES:
                self._known[key] = found
        return found


def _lost(conversation: Conversation, render: Render) -> Lost:
    sentinels = Sentinels(conversation)
    try:
        text = render(sentinels.messages, sentinels.tools)
    except TemplateError:
        # It takes the row's own words and not ours (a list of allowed tools, say): all is well.
        return Lost()
    missing = [e for e in sentinels.expected if e.word not in text]
    printed = {e.message for e in sentinels.expected if e.word in text}
    return Lost(
        tuple(e.what for e in missing),
        tuple(turn for turn in conversation.trained if turn not in printed),
    )
