"""Tool calls and tools of every known spelling to OpenAI's present one.

`function_call`, `functions` and the role "function" are its former spelling; ShareGPT's
"function_call" turns hold one call or a list of them, and turns in a row call in parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dft.data.conversation import RowError
from megatron_dft.data.row_values import check_leaves, check_text, decode_json, kind_of, shown

NULL_NOTE = "null inside the arguments of a tool call is trained as null"
# What Llama's, Anthropic's and other layouts call the arguments of a call.
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_OTHER_KEYS = {"name", "type", "id", "index", "function", "description"}


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
    message["tool_calls"] = [_one_call(call, f"{where}: a tool call", notes) for call in calls]


def _one_call(call: Any, where: str, notes: list[str]) -> dict[str, Any]:
    """A call with its arguments under that name, inside of "function" where it came so."""
    wrapped = isinstance(call, Mapping) and "function" in call
    inner = _call(call["function"] if wrapped else call, where)
    whole = {**call, "function": inner} if wrapped else inner
    if check_leaves(whole, where) and NULL_NOTE not in notes:
        notes.append(NULL_NOTE)
    return whole


def sharegpt_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a "function_call" turn: one, or a list of them."""
    if isinstance(value, str):
        value = decode_json(value, f"{where}: function_call")
    listed = value if isinstance(value, list) and value else [value]
    found = []
    for call in listed:
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        found.append({"type": "function", "function": _call(inner, f"{where}: function_call")})
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    """A function's name and arguments; without any, the arguments are an empty object."""
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(f"{where} must be an object with a name")
    if not call["name"].strip():
        raise RowError(f"{where} has an empty name")
    check_text(call["name"], where)
    given = [key for key in _ARGUMENTS if call.get(key) is not None]
    if len(given) > 1:
        raise RowError(f"{where} has both {given[0]} and {given[1]}; keep one")
    if given:  # in the row's own order, which some templates print
        kept = {k: v for k, v in call.items() if k not in _ARGUMENTS or k == given[0]}
        return {"arguments" if k == given[0] else k: v for k, v in kept.items()}
    rest = {k: v for k, v in call.items() if k not in _ARGUMENTS}
    if strange := [k for k, v in rest.items() if v is not None and k not in _OTHER_KEYS]:
        raise RowError(f"{where} has {shown(strange[0])} and no arguments; call them arguments")
    return {**rest, "arguments": {}}
