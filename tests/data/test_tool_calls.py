"""Tool calls in every spelling train as the template writes a call, never escaped or empty."""

import json

import pytest

from megatron_dft.data.schema import RowError, parse_row
from tests.data.tool_templates import (
    AS_JSON,
    AS_XML,
    CALL,
    CONTENT_ALONE,
    NO_CONTENT,
    NULL_CONTENT,
    PASTED,
    PRINTS_NULL,
    calling,
    chatml,
    texts,
)

_JSON = '{"lake": "Onega"}'
_END = "<|im_end|>127 metres.<|im_end|>"
WRITES = {
    "as json": (AS_JSON, f'<call>{{"name": "depth", "arguments": {_JSON}}}</call>'),
    "pasted": (PASTED, f"<call>depth {_JSON}</call>"),
    "as xml": (AS_XML, "<call=depth><lake>Onega</lake></call>"),
    "null content": (NULL_CONTENT, f"<call>depth {_JSON}</call>"),
    "no content": (NO_CONTENT, f"<call>depth {_JSON}</call>"),
    "prints null": (PRINTS_NULL, f'<call>{{"name": "depth", "arguments": {_JSON}}}</call>'),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("content", [None, ...], ids=["null", "missing"])
@pytest.mark.parametrize("arguments", [{"lake": "Onega"}, _JSON], ids=["object", "text"])
def test_a_call_trains_as_the_template_writes_it(name, content, arguments):
    template, written = WRITES[name]
    row = {"messages": calling(content, arguments)}
    assert texts(chatml(template), row) == [written + _END]


def test_an_empty_content_is_not_null_where_the_template_tells_them_apart():
    """The template prints no call beside a content, empty or not: training would be silence."""
    for template in (NULL_CONTENT, NO_CONTENT):
        with pytest.raises(RowError, match=r"does not print tool call 0 \(message 1\)"):
            texts(chatml(template), {"messages": calling("")})
    written = WRITES["as json"][1]
    assert texts(chatml(AS_JSON), {"messages": calling("")}) == [written + _END]
    assert texts(chatml(AS_JSON), {"messages": calling("Look.")}) == [f"Look.{written}{_END}"]


def test_text_that_is_pasted_keeps_its_own_spelling():
    row = {"messages": calling(None, '{"lake":"Onega" }')}
    assert texts(chatml(PASTED), row) == ['<call>depth {"lake":"Onega" }</call>' + _END]


def test_arguments_that_are_no_object_are_refused_where_one_is_written():
    for arguments in ("Onega", "[1]", "{"):
        with pytest.raises(RowError, match="message 1: the arguments .* no JSON object"):
            texts(chatml(AS_JSON), {"messages": calling(None, arguments)})
    empty = '<call>{"name": "depth", "arguments": {}}</call>'
    assert texts(chatml(AS_JSON), {"messages": calling(None, "")}) == [empty + _END]


def test_a_call_that_is_printed_nowhere_is_refused_and_never_an_empty_answer():
    for drops in ("refuse", "warn"):
        with pytest.raises(RowError, match="does not print tool call 0") as caught:
            texts(chatml(CONTENT_ALONE, drops=drops), {"messages": calling("")})
        assert "--chat-drops warn" not in str(caught.value), "there is nothing left to train"


def test_the_second_of_two_calls_may_not_vanish():
    first_alone = AS_JSON.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    with pytest.raises(RowError, match=r"does not print tool call 1 \(message 1\)"):
        texts(chatml(first_alone), {"messages": calling(None, calls=2)})
    both = WRITES["as json"][1] * 2
    assert texts(chatml(AS_JSON), {"messages": calling(None, calls=2)}) == [both + _END]


def test_openais_former_spelling_is_the_present_one():
    messages = calling(None)
    call = messages[1].pop("tool_calls")[0]["function"]
    messages[1]["function_call"] = {**call, "arguments": json.dumps(call["arguments"])}
    messages[2] = {"role": "function", "name": "depth", "content": "127"}
    found = parse_row({"messages": messages, "functions": [{"name": "depth"}]}, None)
    assert found.tools == [{"type": "function", "function": {"name": "depth"}}]
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert texts(chatml(AS_JSON), {"messages": messages}) == [WRITES["as json"][1] + _END]
    # The text beside a call trains, and so does the call.
    messages[1]["content"] = "Let me look."
    written = "Let me look." + WRITES["as json"][1]
    assert texts(chatml(AS_JSON), {"messages": messages[:2]}) == [written + "<|im_end|>"]


def _sharegpt(*calls):
    turns = [{"from": "function_call", "value": c} for c in calls]
    return {
        "conversations": [
            {"from": "human", "value": "How deep?"},
            *turns,
            {"from": "observation", "value": "127"},
            {"from": "gpt", "value": "127 metres."},
        ]
    }


def test_sharegpts_calls_in_parallel_are_one_answer():
    one = json.dumps(CALL["function"])
    as_text = json.dumps({**CALL["function"], "arguments": _JSON})
    two = [WRITES["as json"][1] * 2 + _END]
    for row in (_sharegpt(one, one), _sharegpt(f"[{one}, {one}]"), _sharegpt(as_text, one)):
        assert texts(chatml(AS_JSON), row) == two
    assert texts(chatml(NULL_CONTENT), _sharegpt(one)) == [WRITES["pasted"][1] + _END]
    uneven = _sharegpt(one, one)
    uneven["conversations"][2]["weight"] = 0
    with pytest.raises(RowError, match="turn 2: calls in parallel must train alike"):
        parse_row(uneven, None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"tool_calls": {}}, "message 1: tool_calls must be a list, not an object"),
        ({"tool_calls": [3]}, "message 1: a tool call must be an object with a name"),
        ({"tool_calls": [{"function": {"name": ""}}]}, "a tool call has an empty name"),
        ({"function_call": "auto"}, "message 1: function_call must be an object with a name"),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, "both tool_calls and func"),
        ({"tool_calls": [{**CALL, "id": "\ud800"}]}, "lone surrogate"),
        ({"reasoning_content": 3}, "message 1: reasoning_content must be text, not a number"),
    ],
)
def test_calls_that_are_none_are_refused(change, reason):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **change}]
    with pytest.raises(RowError, match=reason):
        parse_row({"messages": messages}, None)


def _with_function(function, wrapped=True):
    messages = calling(None)
    messages[1]["tool_calls"] = [{"type": "function", "function": function}]
    if not wrapped:
        messages[1]["tool_calls"] = [function]
    return {"messages": messages}


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_arguments_under_any_known_name_are_printed(key, wrapped):
    """A template that finds none where it looks prints a call without them, silently."""
    row = _with_function({"name": "depth", key: {"lake": "Onega"}}, wrapped)
    template = AS_XML if wrapped else AS_XML.replace("c.function.", "c.")
    assert texts(chatml(template), row) == [WRITES["as xml"][1] + _END]
    turn = json.dumps({"name": "depth", key: {"lake": "Onega"}})
    assert texts(chatml(AS_XML), _sharegpt(turn)) == [WRITES["as xml"][1] + _END]


def test_a_call_without_arguments_has_an_empty_object():
    empty = '<call>{"name": "depth", "arguments": {}}</call>'
    for arguments in ({}, {"arguments": None}, {"arguments": {}, "parameters": None}):
        row = _with_function({"name": "depth", **arguments})
        assert texts(chatml(AS_JSON), row) == [empty + _END]
    for strange, reason in (
        ({"kwargs": {"lake": "Onega"}}, "has 'kwargs' and no arguments; call them arguments"),
        ({"arguments": {}, "input": {}}, "has both arguments and input; keep one"),
    ):
        with pytest.raises(RowError, match=f"message 1: a tool call {reason}"):
            parse_row(_with_function({"name": "depth", **strange}), None)


def test_sharegpts_other_names_of_calls_are_read():
    row = _sharegpt(json.dumps(CALL))  # wrapped as OpenAI wraps it
    row["conversations"][1]["from"] = "tool_call"
    row["conversations"][2]["from"] = "tool_response"
    assert texts(chatml(AS_JSON), row) == [WRITES["as json"][1] + _END]


def test_tools_and_functions_beside_each_other_are_refused():
    row = {"messages": calling(None), "tools": [{"name": "a"}], "functions": [{"name": "b"}]}
    with pytest.raises(RowError, match='both "tools" and "functions"; keep one'):
        parse_row(row, None)
    row = {"messages": calling(None), "tools": ['{"name": "a"}']}
    assert parse_row(row, None).tools == [{"name": "a"}]


def test_a_message_of_calls_alone_is_checked_like_any_other():
    for calls in ("x", [3]):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}]
        with pytest.raises(RowError, match="message 1: (tool_calls|a tool call)"):
            parse_row({"messages": messages}, None)
