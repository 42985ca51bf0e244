"""What a chat template prints, drops and refuses, by role and field: for `inspect-data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_dft.data.chat_mask import TurnRenderer
from megatron_dft.data.conversation import RowError
from megatron_dft.data.messages import conversation
from megatron_dft.data.spec import EncoderSpec

_USER = {"role": "user", "content": "Which?"}
_ANSWER = {"role": "assistant", "content": "This."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def _calling(content: str | None, *places: str, text: bool = False) -> list[dict[str, Any]]:
    calls = [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {
                "name": "look",
                "arguments": f'{{"at": "{place}"}}' if text else {"at": place},
            },
        }
        for i, place in enumerate(places)
    ]
    answers = [
        {"role": "tool", "name": "look", "content": "seen", "tool_call_id": c["id"]} for c in calls
    ]
    called = {"role": "assistant", "content": content, "tool_calls": calls}
    return [_USER, called, *answers, _ANSWER]


# Field → a conversation that uses it and as little else as possible.
_PROBES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "system": ([{"role": "system", "content": "Be."}, _USER, _ANSWER], False),
    "developer": ([{"role": "developer", "content": "Be."}, _USER, _ANSWER], False),
    "reasoning": ([_USER, {**_ANSWER, "reasoning_content": "Since."}], False),
    "tools": ([_USER, _ANSWER], True),
    "tool calls": (_calling(None, "here"), False),
    "arguments as text": (_calling(None, "here", text=True), False),
    "calls in parallel": (_calling(None, "here", "there"), False),
    "text beside a call": (_calling("Let me look.", "here"), False),
}


def template_report(spec: EncoderSpec) -> Mapping[str, str]:
    """Field → "printed", "dropped" or "refused", each tried on a conversation of its own.

    Raises ValueError where the template serves no conversation at all.
    """
    renderer = TurnRenderer(replace(spec, drops="warn"))
    found = {}
    for field, (messages, with_tools) in _PROBES.items():
        probe = conversation(messages, [_TOOL] if with_tools else None)
        try:
            renderer.render(probe)
            found[field] = "dropped" if probe.notes else "printed"
        except RowError as error:
            found[field] = "dropped" if "does not print" in str(error) else "refused"
    return found
