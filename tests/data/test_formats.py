"""Every layout of rows gives the same conversations."""

import pytest

from megatron_dft.data.schema import RowError, detect_format, parse_row
from tests.data.families import FAMILIES
from tests.data.fixtures import (
    byte_level_tokenizer,
    chat,
    chatml_tokenizer,
    decoded,
    prepare_file,
    write_jsonl,
)


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


CHAT = chat("Hi?", "Hello.", "More?", "No.", system="S")
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "More?"},
        {"from": "gpt", "value": "No."},
    ]
}
ALPACA = {"system": "S", "history": [["Hi?", "Hello."]], "instruction": "More?", "output": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        SHAREGPT,
        {"system": "S", "conversations": SHAREGPT["conversations"][1:]},
        ALPACA | {"input": ""},
        ALPACA | {"instruction": "", "input": "More?"},
    ],
)
def test_every_layout_is_recognised_and_says_the_same(row):
    conversation = parse_row(row, None)
    assert conversation.messages == CHAT and conversation.trained == [2, 4]
    assert conversation.tools is None and conversation.text is None


def test_alpacas_input_follows_its_instruction():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert parse_row(row, None).messages == chat("Add.\n\n1 2", "3")


def test_sharegpts_function_calls_become_tool_calls():
    turns = [
        {"from": "human", "value": "12+7?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 12}}'},
        {"from": "observation", "value": "19"},
        {"from": "gpt", "value": "19."},
    ]
    conversation = parse_row({"conversations": turns, "tools": '[{"name": "add"}]'}, None)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12}}}
    assert conversation.messages[1]["tool_calls"] == [call]
    assert conversation.tools == [{"name": "add"}] and conversation.trained == [1, 3]


def test_a_completion_of_messages_trains_alone():
    row = {"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    conversation = parse_row(row, None)
    assert conversation.messages == chat("a", "b", "c", "d") and conversation.trained == [3]


def test_text_prompts_are_used_verbatim_with_the_eos(tmp_path):
    tokenizer = byte_level_tokenizer("{{ messages[0].content }}", ("<s>", "</s>"), "</s>", "<s>")
    tokenizer.chat_template = FAMILIES["mistral"].template
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q: 1+1\nA:", "completion": " 2"}])
    assert decoded(prepare_file(path, tokenizer), tokenizer) == [("Q: 1+1\nA: 2</s>", " 2</s>")]


def test_text_prompts_begin_with_bos_where_the_tokenizer_begins_so(tmp_path):
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(FAMILIES["mistral"].template, ("<s>", "</s>"), "</s>", "<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "completion": "2"}])
    assert decoded(prepare_file(path, tokenizer), tokenizer) == [("<s>2</s>", "2</s>")]


def test_a_format_can_be_named_where_columns_fit_two():
    row = {"messages": CHAT, "instruction": "a", "output": "b"}
    with pytest.raises(RowError, match=r"fit several layouts \(messages, alpaca\).*--data-format"):
        parse_row(row, None)
    assert parse_row(row, "alpaca").messages == chat("a", "b")
    assert detect_format(["output", "instruction"]) == "alpaca"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"instruction": 3, "output": "b"}, '"instruction" must be text, but is a number'),
        ({"instruction": "a", "output": None}, '"output" must be text, but is null'),
        ({"instruction": "a", "output": float("nan")}, '"output" is NaN'),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, '"input" must be .* NaN'),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history 0 must be a pair"),
        ({"instruction": "a", "output": " "}, r"message 1 \(assistant\): empty content"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "turn 0: \"from\" is 'me'; expected"),
        ({"conversations": ["a"]}, "turn 0 must be an object, not text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "function_call is not JSON"),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "a", "completion": []}, "must both be text or both be lists"),
        ({"prompt": chat("a", "b"), "completion": chat("c")}, "the completion has no assistant"),
        ({"messages": float("nan")}, '"messages" is NaN'),
        ({"messages": CHAT, "tools": 3}, '"tools" must be a list'),
    ],
)
def test_rows_of_other_layouts_are_checked_too(row, reason):
    with pytest.raises(RowError, match=reason):
        parse_row(row, None)
