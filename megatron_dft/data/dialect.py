"""How a chat template wants tool calls: arguments as object or text, content null, "" or absent.

Templates differ, data sets too, and the wrong pair trains an escaped string, the word "None", or an
answer of nothing. What each form gives is tried with sentinels, the usual one first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.template import ChatTemplate, TemplateError

_ABSENT: Any = object()
_TEXT = "Zqtext"
_AS_OBJECT = {"Zqkey": "Zqvalue"}
_AS_TEXT = json.dumps(_AS_OBJECT)
_TOOL = {
    "type": "function",
    "function": {
        "name": "zqtool",
        "description": "d",
        "parameters": {"type": "object", "properties": {"Zqkey": {"type": "string"}}},
    },
}


class Dialect:
    """What a template wants of messages with tool calls; tried when the first one comes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation with its tool calls as the template wants them.

        Raises RowError where arguments have to be an object and are none.
        """
        messages = [
            self._adapt(m, i) if "tool_calls" in m else m
            for i, m in enumerate(conversation.messages)
        ]
        return Conversation(
            messages,
            conversation.trained,
            conversation.tools,
            weights=conversation.weights,
            calls=True,
            unread=conversation.unread,
            notes=conversation.notes,
        )

    def _adapt(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        adapted = {**message, "tool_calls": [self._call(c, index) for c in message["tool_calls"]]}
        content = message.get("content", _ABSENT)
        if content is None or content is _ABSENT:
            _put(adapted, self._null if content is None else self._absent)
        return adapted

    def _call(self, call: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if self._arguments == "text":
            if isinstance(arguments, Mapping):
                arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str):
            arguments = _decoded(arguments, index)
        if arguments is function.get("arguments"):
            return dict(call)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    @cached_property
    def _arguments(self) -> str:
        for form, arguments in (("object", _AS_OBJECT), ("text", _AS_TEXT)):
            for content in (None, "", _ABSENT, _TEXT):
                if _whole(self._try(arguments, content)):
                    return form
        return "object"

    @cached_property
    def _null(self) -> str | None:
        return self._first((None, "", _ABSENT))

    @cached_property
    def _absent(self) -> str | None:
        return self._first((_ABSENT, None, ""))

    def _first(self, forms: tuple[str | None, ...]) -> str | None:
        """The first form of no content with which the call is printed and no "None" is."""
        arguments = _AS_TEXT if self._arguments == "text" else _AS_OBJECT
        usual = self._try(arguments, _TEXT)
        for form in forms:
            text = self._try(arguments, form)
            invented = any(text.count(word) > usual.count(word) for word in ("None", "null"))
            if _whole(text) and not invented:
                return form
        return ""  # no call is printed at all, which the search for dropped parts says better

    def _try(self, arguments: Any, content: str | None) -> str:
        """A conversation with one call as text; "" where the template refuses it."""
        # Mistral's templates take ids of nine letters or digits alone.
        call = {"id": "Zqcall001", "type": "function"}
        said = {"role": "assistant", "content": content, "tool_calls": [
            {**call, "function": {"name": "zqtool", "arguments": arguments}}]}  # fmt: skip
        _put(said, content)
        answer = {"role": "tool", "content": "Zqanswer", "tool_call_id": "Zqcall001"}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Zquser"},
            said,
            {**answer, "name": "zqtool"},
            {"role": "assistant", "content": "Zqlast"},
        ]
        for tools in ([_TOOL], None):
            for turns in (messages, messages[:2]):
                try:
                    return self._template.render(turns, tools)
                except TemplateError:
                    continue
        return ""


def _put(message: dict[str, Any], content: str | None) -> None:
    if content is _ABSENT:
        message.pop("content", None)
    else:
        message["content"] = content


def _whole(text: str) -> bool:
    """Whether a rendering shows the arguments as an object is written, not a string of it."""
    # Two quotations are wrong: Python's of a dict, and JSON's of a text that is JSON itself.
    wrong = "'Zqkey'" in text or '\\"Zqkey' in text
    return "zqtool" in text and "Zqkey" in text and "Zqvalue" in text and not wrong


def _decoded(arguments: str, index: int) -> Any:
    if not arguments.strip():
        return {}
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RowError(
            f"message {index}: the arguments of a tool call are text that is no JSON object, and "
            "the chat template writes an object"
        )
    return found
