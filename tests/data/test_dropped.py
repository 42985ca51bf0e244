"""No message of a row vanishes without a word, and none is invented."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dft.cli import main
from megatron_dft.data.prepare import notes
from megatron_dft.data.schema import RowError, parse_row
from megatron_dft.data.template_report import template_report
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import (
    CHATML_SPECIALS,
    byte_level_tokenizer,
    chat,
    decoded,
    prepare_file,
    write_jsonl,
)
from tests.data.tool_templates import AS_JSON, CONTENT_ALONE, calling, chatml, texts

_KNOWN = "{% for m in messages if m.role in ['user', 'assistant', 'tool'] %}"
# Prints users, tools' answers and assistants alone, and no reasoning.
FEW_ROLES = CONTENT_ALONE.replace("{% for m in messages %}", _KNOWN)
THOUGHT = {"role": "assistant", "content": "56", "reasoning_content": "7*7+7"}
DROPPED = {
    "system": (chat("a", "b", system="s"), r"the system message \(message 0\)"),
    "developer": (
        [{"role": "developer", "content": "d"}, *chat("a", "b")],
        r"the developer message \(message 0\)",
    ),
    "reasoning": ([*chat("7*8?"), THOUGHT], r"the reasoning \(message 1\)"),
    "beside others": (
        [{"role": "developer", "content": "d"}, *chat("a", "b", "7*8?"), THOUGHT],
        r"the developer message \(message 0\), the reasoning \(message 4\)",
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_the_template_prints_nowhere_is_refused_by_row(tmp_path, name):
    messages, what = DROPPED[name]
    with pytest.raises(RowError, match=f"does not print {what}; .* --chat-drops warn"):
        texts(chatml(FEW_ROLES), {"messages": messages})
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}, {"messages": messages}])
    tokenizer = byte_level_tokenizer(FEW_ROLES, CHATML_SPECIALS, eos="<|im_end|>")
    with pytest.raises(ValueError, match=f"a.jsonl:2: the chat template does not print {what}"):
        prepare_file(path, tokenizer)


def test_with_warn_the_rest_trains_and_it_is_said_once(tmp_path):
    tokenizer, _ = chatml(FEW_ROLES)
    spec = encoder_spec(tokenizer, drops="warn")
    from megatron_dft.data.prepare import PrepareOptions, prepare
    from megatron_dft.data.sources import parse_sources

    rows = [{"messages": DROPPED["reasoning"][0]}] * 3 + [{"messages": DROPPED["developer"][0]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (store,) = prepare(parse_sources([path]), spec, PrepareOptions())
    assert [t for _, t in decoded(store, tokenizer)] == ["56<|im_end|>"] * 3 + ["b<|im_end|>"]
    assert notes(store) == {
        "the chat template does not print the reasoning": 3,
        "the chat template does not print the developer message": 1,
    }


def test_tools_that_are_printed_nowhere_are_refused():
    row = {"messages": chat("a", "b"), "tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(RowError, match="does not print tool 0"):
        texts(chatml(CONTENT_ALONE), row)
    assert texts(chatml(AS_JSON), row) == ["b<|im_end|>"]


def test_the_reasoning_of_context_may_go_as_it_goes_at_inference():
    """Qwen3's manner drops the reasoning of earlier turns; what trains is never dropped."""
    family = FAMILIES["qwen3"]
    pair = family.tokenizer(), chatml_of(family)
    messages = [*chat("7*8?"), THOUGHT, *chat("And 2?", "58")]
    assert texts(pair, {"messages": messages}) == [
        "<think>\n7*7+7\n</think>\n\n56<|im_end|>",
        "<think>\n\n</think>\n\n58<|im_end|>",
    ]
    messages[1] = {**THOUGHT, "train": False}
    assert texts(pair, {"messages": messages}) == ["<think>\n\n</think>\n\n58<|im_end|>"]


def chatml_of(family):
    from megatron_dft.data.encode import ChatEncoder

    return ChatEncoder(encoder_spec(family.tokenizer()))


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("a", "b")},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"prompt": chat("a"), "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_the_rows_own_system_column_leads_every_layout(row, column):
    found = parse_row({**row, column: "S"}, None)
    assert found.messages == chat("a", "b", system="S") and found.trained == [2]
    for empty in (None, ""):
        assert parse_row({**row, column: empty}, None).messages == chat("a", "b")
    with pytest.raises(RowError, match=f'"{column}" must be text'):
        parse_row({**row, column: 3}, None)


def test_two_system_prompts_are_refused_and_one_that_is_repeated_is_one():
    row = {"system": "S", "messages": chat("a", "b", system="other")}
    with pytest.raises(RowError, match='both "system" and a system message; keep one'):
        parse_row(row, None)
    row = {"system": "S", "messages": chat("a", "b", system="S")}
    assert parse_row(row, None).messages == chat("a", "b", system="S")
    with pytest.raises(RowError, match="used verbatim, so that its system prompt"):
        parse_row({"system": "S", "prompt": "a", "completion": "b"}, None)


def test_nulls_that_a_table_fills_in_are_not_trained(tmp_path):
    """Two rows with different arguments, tools and keys: Arrow gives each those of both."""
    second = calling(None, {"city": "Kyiv", "deep": {"er": 1}})
    rows = [{"messages": calling(None)}, {"messages": second, "system": "S"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), path)
    tokenizer, _ = chatml(AS_JSON)
    trained = [t for _, t in decoded(prepare_file(path, tokenizer), tokenizer)]
    assert "null" not in "".join(trained) and "None" not in "".join(trained)
    assert [t for _, t in decoded(_jsonl(tmp_path, rows, tokenizer), tokenizer)] == trained


def _schema(rows):
    return pa.concat_tables(
        [pa.Table.from_pylist([r]) for r in rows], promote_options="permissive"
    ).schema


def _jsonl(tmp_path, rows, tokenizer):
    return prepare_file(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer)


def test_a_null_of_the_rows_own_trains_and_is_said(tmp_path):
    tokenizer, _ = chatml(AS_JSON)
    store = _jsonl(tmp_path, [{"messages": calling(None, {"lake": None})}], tokenizer)
    assert '"arguments": {"lake": null}' in decoded(store, tokenizer)[0][1]
    assert list(notes(store)) == ["null inside the arguments of a tool call is trained as null"]


def test_keys_that_nothing_reads_are_listed_once(tmp_path):
    rows = [
        {"messages": [{**m, "mood": "calm", "name": "n"} for m in chat("a", "b")], "id": i}
        for i in range(3)
    ]
    tokenizer, _ = chatml(AS_JSON)
    assert notes(_jsonl(tmp_path, rows, tokenizer)) == {
        "column 'id' is not read": 3,
        "key 'mood' of messages is not read": 3,
    }
    refused = [{"messages": [*chat("a", "b", "c"), {**chat("", "d")[1], "refusal": "No."}]}]
    assert notes(_jsonl(tmp_path, refused, tokenizer)) == {
        "key 'refusal' of messages is not read": 1
    }
    # A key that the template reads is no unknown one.
    moody = AS_JSON.replace("{{ m.content or '' }}", "{{ m.mood }}{{ m.content or '' }}")
    found = notes(_jsonl(tmp_path, rows, chatml(moody)[0]))
    assert found == {"column 'id' is not read": 3}
    many = [{"messages": chat("a", "b"), f"c{i}": 1} for i in range(500)]
    assert len(notes(_jsonl(tmp_path, many, tokenizer))) <= 51


def test_the_report_of_a_template_says_what_it_does_with_each_field():
    report = template_report(encoder_spec(chatml(AS_JSON)[0]))
    assert set(report.values()) == {"printed"} and len(report) == 8
    report = template_report(encoder_spec(FAMILIES["gemma"].tokenizer()))
    assert report["system"] == "refused" and report["developer"] == "printed"
    assert report["reasoning"] == report["tools"] == report["tool calls"] == "dropped"


def test_inspect_says_why_where_no_row_is_good(tmp_path, capsys):
    chatml(FEW_ROLES)[0].save_pretrained(tmp_path / "tok")
    messages = [*chat("Two facts."), *chat("x", "One.")[1:], *chat("x", "Two.")[1:]]
    rows = [{"messages": messages}, {"messages": DROPPED["developer"][0]}, {"messages": messages}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = ["--data-cache", str(tmp_path / "c"), "--tokenizer", str(tmp_path / "tok")]
    for errors in ([], ["--data-errors", "skip", "--max-bad-rows", "9"]):
        status = main(["inspect-data", "--train-data", path, *options, *errors, "--show", "3"])
        out, err = capsys.readouterr()
        assert status == 1
        assert "a.jsonl:1: wrong role order: message 2 (assistant) follows assistant" in out
        assert "template drops      system, developer, reasoning, tools" in out
        assert "a.jsonl:1: wrong role order: message 2 (assistant) follows assistant" in err
    assert "no row can be trained on" in err and "a.jsonl:2: the chat template does not" in err
    assert "a.jsonl:3" not in err, "one row of each reason"
