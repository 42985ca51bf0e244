"""Rows of any known layout to one form: `Conversation`; every wrong row gets a one-line reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.messages import conversation
from megatron_dft.data.rewards import reward_of
from megatron_dft.data.row_values import check_text, column, kind_of, shown
from megatron_dft.data.spec import RowKind
from megatron_dft.data.tool_calls import sharegpt_calls, tools_of
from megatron_dft.data.training_keys import is_training_key, message_weight, product, row_weight

CHAT = RowKind()
FORMATS = ("messages", "prompt-completion", "alpaca", "sharegpt")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
_SYSTEM_COLUMNS = ("system", "system_prompt")
_COLUMNS = {
    "messages": {"messages", "tools", "functions"},
    "prompt-completion": {"prompt", "completion", "tools", "functions"},
    "alpaca": {"instruction", "input", "output", "history", "tools", "functions"},
    "sharegpt": {"conversations", "tools", "functions"},
}


class NothingToTrain(RowError):
    """A row of weight 0: left out because it asks for it, and no fault."""


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
    if {"chosen", "rejected"} & have and not fits:
        raise RowError("the row is a pair of answers, which --loss dpo trains on")
    seen = ", ".join(c[:40] for c in sorted(map(str, have))[:12]) or "none"
    if not fits:
        raise RowError(
            f"columns [{seen}] show no known layout; expected messages, or prompt and completion, "
            "or instruction and output, or conversations (--columns instruction=question "
            "output=answer, where they have other names)"
        )
    raise RowError(
        f"columns [{seen}] fit several layouts ({', '.join(fits)}); name one with --data-format"
    )


def parse_row(row: Any, data_format: str | None, kind: RowKind = CHAT) -> Conversation:
    """A decoded row in layout `data_format` (one of FORMATS) to a Conversation.

    None recognises the layout by the row's columns. `kind`: whether its reward is read.

    Raises RowError with the reason: missing columns, wrong role order, empty content, no assistant
    turn to train on, not text, a bad reward; NothingToTrain for a row of weight or reward 0.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be a JSON object, not {kind_of(row)}")
    layout = data_format or detect_format(list(row))
    weight = row_weight(row) if len(row) > 1 else 1.0
    if kind.name in ("weighted", "rewarded"):
        weight = product(weight, reward_of(row, kind), "the row")
    found = _PARSERS[layout](row, weight or 1.0)
    if not weight:
        raise NothingToTrain("the row has weight or reward 0")
    if len(row) > 1:
        known = _COLUMNS[layout]
        found.notes += [
            f"column {shown(c)} is not read"
            for c, value in row.items()
            if c not in known
            and c not in _SYSTEM_COLUMNS
            and value is not None
            and not _is_weight(c, layout)
            and not (c == "reward" and kind != CHAT)
        ]
    return found


def _is_weight(name: Any, layout: str) -> bool:
    """Columns that row_weight has read; a verbatim or Alpaca row has no other training keys."""
    return is_training_key(name) and "weight" in str(name).lower()


def _parse_messages(row: Mapping[str, Any], weight: float) -> Conversation:
    messages = _with_system(row, column(row, "messages", list))
    return conversation(messages, tools_of(row), weight)


def _parse_sharegpt(row: Mapping[str, Any], weight: float) -> Conversation:
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(column(row, "conversations", list)):
        where = f"turn {index}"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} must be an object, not {kind_of(turn)}")
        sender = turn.get("from", turn.get("role"))
        role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowError(f'{where}: "from" is {shown(sender)}; expected one of {known}')
        value = turn.get("value", turn.get("content"))
        rest = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
        if role != "function_call":
            messages.append({"role": role, "content": value, **rest})
        elif messages and messages[-1].get("from") == role:
            _call_in_parallel(messages[-1], value, rest, where)
        else:
            calls = sharegpt_calls(value, where)
            own = {"role": "assistant", "content": None, "tool_calls": calls, "from": role}
            messages.append({**rest, **own})
    for message in messages:
        message.pop("from", None)
    return conversation(_with_system(row, messages), tools_of(row), weight)


def _call_in_parallel(
    turn: dict[str, Any], value: Any, rest: Mapping[str, Any], where: str
) -> None:
    """A "function_call" turn that follows another one is a second call of the same answer."""
    turn["tool_calls"] = turn["tool_calls"] + sharegpt_calls(value, where)
    if message_weight(turn, where) != message_weight(rest, where):
        raise RowError(f"{where}: calls in parallel must train alike, with the same weight")


def _parse_alpaca(row: Mapping[str, Any], weight: float) -> Conversation:
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f'"history" must be a list of pairs, not {kind_of(history)}')
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {index} must be a pair [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    question = column(row, "instruction", str)
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f'"input" must be text, not {kind_of(extra)}')
    if extra:
        question = f"{question}\n\n{extra}" if question else extra
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": column(row, "output", str)})
    return conversation(_with_system(row, messages), tools_of(row), weight)


def parse_prompt_completion(row: Mapping[str, Any], weight: float) -> Conversation:
    """As `parse_row`, of prompt and completion; only the completion trains."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _verbatim(row, prompt, completion, weight)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _with_system(row, prompt)
        found = conversation([*before, *completion], tools_of(row), weight)
        # The prompt's own assistant turns are context: only the completion trains.
        found.trained = [i for i in found.trained if i >= len(before)]
        found.weights = {i: w for i, w in found.weights.items() if i >= len(before)}
        if not found.trained:
            raise RowError("the completion has no assistant turn that trains")
        return found
    raise RowError(
        '"prompt" and "completion" must both be text or both be lists of messages, not '
        f"{kind_of(prompt)} and {kind_of(completion)}"
    )


def _verbatim(row: Mapping[str, Any], prompt: str, completion: str, weight: float) -> Conversation:
    check_text(prompt, '"prompt"')
    check_text(completion, '"completion"')
    if not completion.strip():
        raise RowError('"completion" is empty')
    if _with_system(row, []) or tools_of(row):
        raise RowError(
            "a prompt of text is used verbatim, so that its system prompt or tools would reach no "
            "token; put them into the prompt, or give lists of messages"
        )
    weights = {} if weight == 1 else {0: weight}
    return Conversation([], [0], text=(prompt, completion), weights=weights)


def _with_system(row: Mapping[str, Any], messages: list[Any]) -> list[Any]:
    """The messages, led by the row's own system column where it has one."""
    for name in _SYSTEM_COLUMNS:
        text = row.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise RowError(f'"{name}" must be text, not {kind_of(text)}')
        first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
        if first.get("role") not in ("system", "developer"):
            messages = [{"role": "system", "content": text}, *messages]
        elif first.get("content") != text:
            raise RowError(f'the row has both "{name}" and a system message; keep one')
    return messages


_PARSERS = {
    "messages": _parse_messages,
    "prompt-completion": parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
}
