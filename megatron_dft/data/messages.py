"""A list of messages, checked and brought into one spelling: what every layout comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.row_values import check_leaves, check_text, kind_of, shown
from megatron_dft.data.template import REASONING_NAMES, alias_reasoning
from megatron_dft.data.tool_calls import tool_calls_of
from megatron_dft.data.training_keys import is_training_key, message_weight, product

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Every turn is rendered with all before it: a row of 2,048 messages takes a second, of 8,000 ten.
MAX_MESSAGES = 2048
_READ = {
    "role", "content", "name", "tool_calls", "tool_call_id", "function_call",
    *REASONING_NAMES,
}  # fmt: skip
USER_NOTE = "messages that ask to train and are not the assistant's do not train"


def conversation(
    messages: Sequence[Any], tools: list[Any] | None, row_weight: float = 1.0
) -> Conversation:
    """Messages of OpenAI's layout, its former one too, to a Conversation.

    Raises RowError with the reason: wrong role order, empty content, no assistant turn to train
    on, not text.
    """
    if len(messages) > MAX_MESSAGES:
        raise RowError(f"it has {len(messages)} messages, more than {MAX_MESSAGES}; split the row")
    found = Conversation([], [], tools)
    previous = ""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"message {index} must be an object, not {kind_of(message)}")
        if _is_plain(message):
            cleaned = dict(message)
            _check_order(cleaned["role"], previous, index)
            _check_content(cleaned["content"], cleaned["role"], index)
        else:
            cleaned = _message(message, previous, index, found)
        previous = cleaned["role"]
        if len(message) > 2:
            _train_as_asked(message, cleaned, index, row_weight, found)
        elif previous == "assistant":
            found.trained.append(index)
            if row_weight != 1:
                found.weights[index] = row_weight
        found.messages.append(alias_reasoning(cleaned) if len(cleaned) > 2 else cleaned)
    if not any(m["role"] == "assistant" for m in found.messages):
        raise RowError("it has no assistant turn")
    if not found.trained:
        raise RowError("every assistant turn is left out by train: false or weight: 0")
    return found


def _is_plain(message: Mapping[Any, Any]) -> bool:
    """Role and text alone, as nearly always: there is nothing to bring into another spelling."""
    return (
        len(message) == 2
        and isinstance(message.get("content"), str)
        and message.get("role") in _ROLES
    )


def _message(
    message: Mapping[Any, Any], previous: str, index: int, found: Conversation
) -> dict[str, Any]:
    """The message in today's spelling, without the keys that say how it trains."""
    where = f"message {index}"
    # Arrow fills absent fields with None; templates treat a present None as "None".
    cleaned = dict(message)
    if None in cleaned.values():
        cleaned = {k: v for k, v in message.items() if v is not None or k == "content"}
    role = cleaned.get("role")
    if role == "function":
        role = cleaned["role"] = "tool"
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"{where}: role {shown(role)}; expected one of {', '.join(_ROLES)}")
    _check_order(role, previous, index)
    if len(cleaned) > 2 or "content" not in cleaned:
        if "tool_calls" in cleaned or "function_call" in cleaned:
            tool_calls_of(cleaned, where, found.notes)
            found.calls = found.calls or "tool_calls" in cleaned
        _clean_other_keys(cleaned, where, found)
    _set_content(cleaned, role, index)
    return cleaned


def _clean_other_keys(cleaned: dict[str, Any], where: str, found: Conversation) -> None:
    for key in [k for k in cleaned if k not in _READ]:
        if is_training_key(key):
            del cleaned[key]
        else:
            check_leaves([key, cleaned[key]], f"{where}: {shown(key)}")
            found.unread.add(str(key))
    for key in REASONING_NAMES:
        if not isinstance(cleaned.get(key, ""), str):
            raise RowError(f"{where}: {key} must be text, not {kind_of(cleaned[key])}")
    for key in ("name", "tool_call_id", *REASONING_NAMES):
        if key in cleaned:
            check_leaves(cleaned[key], f"{where}: {key}")


def _train_as_asked(
    message: Mapping[Any, Any],
    cleaned: dict[str, Any],
    index: int,
    row_weight: float,
    found: Conversation,
) -> None:
    where = f"message {index}"
    weight, asked = message_weight(message, where)
    if cleaned["role"] != "assistant":
        if asked and USER_NOTE not in found.notes:
            found.notes.append(USER_NOTE)
        return
    weight = product(weight, row_weight, where)
    if weight:
        found.trained.append(len(found.messages))
        if weight != 1:
            found.weights[len(found.messages)] = weight


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


def _set_content(cleaned: dict[str, Any], role: str, index: int) -> None:
    """Text in place of parts; null and absent stay as they are beside tool calls, else are ""."""
    calls = role == "assistant" and "tool_calls" in cleaned
    content, where = cleaned.get("content"), f"message {index}: content"
    if isinstance(content, list):
        parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else p for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise RowError(f"{where} has parts that are not text")
        content = "".join(parts)
    if content is None:
        if calls:
            return
        content = ""
    elif not isinstance(content, str):
        raise RowError(f"{where} must be text, not {kind_of(content)}")
    cleaned["content"] = content
    _check_content(content, role, index, calls)


def _check_content(content: str, role: str, index: int, calls: bool = False) -> None:
    """`calls`: beside tool calls an answer may be empty."""
    if "\0" in content or not content.isascii():  # else there is nothing that check_text refuses
        check_text(content, f"message {index}: content")
    if role in ("user", "assistant") and not calls and (not content or content.isspace()):
        raise RowError(f"message {index} ({role}): empty content")
