"""Tool calls and tools of every known spelling to OpenAI's present one.

`function_call`, `functions` and the role "function" are its former spelling; ShareGPT's
"function_call" turns hold one call or a list of them, and turns in a row call in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dft.data.conversation import RowError
from megatron_dft.data.row_values import check_leaves, check_text, decode_json, kind_of

NULL_NOTE = "null inside the arguments of a tool call is trained as null"


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The row's tools as a list of JSON schemas; None where it names none."""
    if "tools" not in row and "functions" not in row:
        return None
    tools = _listed(row.get("tools"), "tools")
    functions = _listed(row.get("functions"), "functions")
    if tools and functions:
        raise RowError('the row has both "tools" and "functions"; keep one')
    tools = tools or [{"type": "function", "function": f} for f in functions]
    check_leaves(tools, '"tools"')
    return tools or None


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = decode_json(value, f'"{name}"') if value.strip() else None
    if value is None:
        return []
    if isinstance(value, list):
        value = [decode_json(t, f'"{name}"') if isinstance(t, str) else t for t in value]
    if not isinstance(value, list) or not all(isinstance(t, Mapping) for t in value):
        raise RowError(f'"{name}" must be a list of JSON schemas')
    return list(value)


def tool_calls_of(message: dict[str, Any], where: str, notes: list[str]) -> None:
    """Brings a message's calls into `tool_calls`, in place; the key is absent where it has none."""
    calls = message.pop("tool_calls", None)
    legacy = message.pop("function_call", None)
    if isinstance(calls, str):
        calls = decode_json(calls, f"{where}: tool_calls") if calls.strip() else None
    if calls and legacy:
        raise RowError(f"{where} has both tool_calls and function_call; keep one")
    if legacy:
        calls = [{"type": "function", "function": _call(legacy, f"{where}: function_call")}]
    if calls is None or calls == []:
        return
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls must be a list, not {kind_of(calls)}")
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        _call(inner, f"{where}: a tool call")
        if check_leaves(call, f"{where}: a tool call") and NULL_NOTE not in notes:
            notes.append(NULL_NOTE)
    message["tool_calls"] = calls


def sharegpt_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a "function_call" turn: one, or a list of them."""
    if isinstance(value, str):
        value = decode_json(value, f"{where}: function_call")
    listed = value if isinstance(value, list) and value else [value]
    return [
        {"type": "function", "function": _call(call, f"{where}: function_call")} for call in listed
    ]


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(f"{where} must be an object with a name")
    if not call["name"].strip():
        raise RowError(f"{where} has an empty name")
    check_text(call["name"], where)
    return dict(call)
