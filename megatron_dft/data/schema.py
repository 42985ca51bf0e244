"""Rows of any known layout to one form: `Conversation`; every wrong row gets a one-line reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dft.data.template import alias_reasoning, has_marks

FORMATS = ("messages", "prompt-completion", "alpaca", "sharegpt")

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# What of a message says whether it trains; templates never see these.
_TRAIN_KEYS = ("train", "weight")


class RowError(ValueError):
    """A row that cannot be trained on; the message is the reason, without file and line."""


@dataclass
class Conversation:
    """One row. Either `messages` (rendered by the chat template) or `text` (used verbatim).

    messages: dicts with role and content, in order; tools: JSON schemas or None; trained: indices
    of the assistant messages that train, ascending, never empty; text: (prompt, completion).
    """

    messages: list[dict[str, Any]]
    trained: list[int]
    tools: list[Any] | None = None
    text: tuple[str, str] | None = None

    def assistant_turns(self) -> list[int]:
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]


def detect_format(columns: Sequence[str]) -> str:
    """The layout that a row's columns show; raises RowError where none or several fit."""
    have = set(columns)
    fits = []
    if "messages" in have:
        fits.append("messages")
    if {"prompt", "completion"} <= have:
        fits.append("prompt-completion")
    if {"instruction", "output"} <= have:
        fits.append("alpaca")
    if "conversations" in have:
        fits.append("sharegpt")
    if len(fits) == 1:
        return fits[0]
    shown = ", ".join(sorted(map(str, have))[:12]) or "none"
    if not fits:
        raise RowError(
            f"columns [{shown}] show no known layout; expected messages, or prompt and completion, "
            "or instruction and output, or conversations"
        )
    raise RowError(
        f"columns [{shown}] fit several layouts ({', '.join(fits)}); name one with --data-format"
    )


def parse_row(row: Any, data_format: str | None) -> Conversation:
    """A decoded row in layout `data_format` (one of FORMATS) to a Conversation.

    None recognises the layout by the row's columns.

    Raises RowError with the reason: missing columns, wrong role order, empty content, no assistant
    turn to train on, not text.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be a JSON object, not {_kind(row)}")
    return _PARSERS[data_format or detect_format(list(row))](row)


def _parse_messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(_column(row, "messages", list), _tools(row))


def _parse_sharegpt(row: Mapping[str, Any]) -> Conversation:
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for index, turn in enumerate(_column(row, "conversations", list)):
        if not isinstance(turn, Mapping):
            raise RowError(f"turn {index} must be an object, not {_kind(turn)}")
        sender = turn.get("from", turn.get("role"))
        role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowError(f'turn {index}: "from" is {sender!r}; expected one of {known}')
        value = turn.get("value", turn.get("content"))
        message = {"role": role, "content": value}
        message.update({k: turn[k] for k in _TRAIN_KEYS if k in turn})
        if role == "function_call":
            message.update(role="assistant", content="", tool_calls=[_function_call(value, index)])
        messages.append(message)
    return _conversation(messages, _tools(row))


def _parse_alpaca(row: Mapping[str, Any]) -> Conversation:
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for index, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError(f"history {index} must be a pair [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    question = _column(row, "instruction", str)
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f'"input" must be text, not {_kind(extra)}')
    if extra:
        question = f"{question}\n\n{extra}" if question else extra
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _column(row, "output", str)})
    return _conversation(messages, None)


def _parse_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        _check_text(prompt, '"prompt"')
        _check_text(completion, '"completion"')
        if not completion.strip():
            raise RowError('"completion" is empty')
        return Conversation([], [0], text=(prompt, completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        conversation = _conversation([*prompt, *completion], _tools(row))
        # The prompt's own assistant turns are context: only the completion trains.
        conversation.trained = [i for i in conversation.trained if i >= len(prompt)]
        if not conversation.trained:
            raise RowError("the completion has no assistant turn that trains")
        return conversation
    raise RowError(
        '"prompt" and "completion" must both be text or both be lists of messages, not '
        f"{_kind(prompt)} and {_kind(completion)}"
    )


_PARSERS = {
    "messages": _parse_messages,
    "prompt-completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
}


def _conversation(messages: Sequence[Any], tools: list[Any] | None) -> Conversation:
    cleaned: list[dict[str, Any]] = []
    trained: list[int] = []
    previous = ""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"message {index} must be an object, not {_kind(message)}")
        # Arrow fills absent fields with None; templates treat a present None as "None".
        message = {k: v for k, v in message.items() if v is not None}
        role = message.get("role")
        if role not in _ROLES:
            raise RowError(f"message {index}: role {role!r}; expected one of {', '.join(_ROLES)}")
        _check_order(role, previous, index)
        message["content"] = _content(message, role, index)
        trains = _trains(message, index)
        if role == "assistant" and trains:
            trained.append(index)
        for key in _TRAIN_KEYS:
            message.pop(key, None)
        cleaned.append(alias_reasoning(message))
        previous = role
    if not any(m["role"] == "assistant" for m in cleaned):
        raise RowError("it has no assistant turn")
    if not trained:
        raise RowError("every assistant turn is left out by train: false or weight: 0")
    return Conversation(cleaned, trained, tools)


def _check_order(role: str, previous: str, index: int) -> None:
    if role in ("system", "developer"):
        wrong = index > 0
    elif role == "user":
        wrong = previous == "user"
    elif role == "assistant":
        wrong = previous in ("", "system", "developer", "assistant")
    else:
        wrong = previous not in ("assistant", "tool")
    if wrong:
        after = f"follows {previous}" if previous else "comes first"
        raise RowError(f"wrong role order: message {index} ({role}) {after}")


def _content(message: Mapping[str, Any], role: str, index: int) -> str:
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise RowError(f"message {index}: content has parts that are not text")
        content = "".join(p for p in parts if p)
    if not isinstance(content, str):
        raise RowError(f"message {index}: content must be text, not {_kind(content)}")
    _check_text(content, f"message {index}: content")
    said_otherwise = role == "assistant" and message.get("tool_calls")
    if role in ("user", "assistant") and not said_otherwise and not content.strip():
        raise RowError(f"message {index} ({role}): empty content")
    return content


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"{where} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which is no text"
            ) from None
        if has_marks(text):
            raise RowError(f"{where} holds a private-use character U+10FFF0 or U+10FFF1")
    if "\0" in text:
        raise RowError(f"{where} holds a NUL character")


def _trains(message: Mapping[str, Any], index: int) -> bool:
    train, weight = message.get("train", True), message.get("weight", 1)
    if not isinstance(train, bool):
        raise RowError(f"message {index}: train must be true or false, not {train!r}")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"message {index}: weight must be 0 or 1, not {weight!r}")
    return train and weight == 1


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f'"tools" is not JSON: {error.msg}') from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise RowError('"tools" must be a list of JSON schemas')
    return list(tools)


def _function_call(value: Any, index: int) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RowError(f"turn {index}: function_call is not JSON: {error.msg}") from None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(f"turn {index}: function_call must be an object with a name")
    return {"type": "function", "function": dict(call)}


def _column(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if isinstance(value, float) and math.isnan(value):
        raise RowError(f'"{name}" is NaN')
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        came = "missing" if name not in row else _kind(value)
        raise RowError(f'"{name}" must be {expected}, but is {came}')
    return value


def _kind(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "text", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
