"""Rows of every layout to prompts; wrong rows are counted by kind and move no number."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dft.rollout.prompts import Shape, fingerprint, parse_columns, read_prompts


def write(path, rows):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(path, *columns, **shape):
    return read_prompts([path], Shape(parse_columns(columns), **shape), "--prompts")


def test_columns_and_layouts(tmp_path):
    rows = [
        {"question": "a?", "answer": 1},
        {"problem": "b?", "answer": "two"},
        {"messages": [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "3"}]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "d?"}]},
    ]
    prompts, skips = read(write(tmp_path / "p.jsonl", rows))
    assert [p.messages[-1]["content"] for p in prompts] == ["a?", "b?", "c?", "d?"]
    assert [p.answer for p in prompts] == [1, "two", "3", None]
    assert [p.number for p in prompts] == [0, 1, 2, 3] and not skips.counts
    assert prompts[1].where == f"{tmp_path / 'p.jsonl'}:2"


def test_a_named_prompt_column_wins_over_messages(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "no"}], "text": "yes", "gold": "g"}]
    prompts, _ = read(write(tmp_path / "p.jsonl", rows), "prompt=text", "answer=gold")
    assert prompts[0].messages == [{"role": "user", "content": "yes"}]
    assert prompts[0].answer == "g"


def test_parquet_gives_what_json_lines_give(tmp_path):
    rows = [{"question": "a {prompt}?", "answer": "1"}, {"question": "b?", "answer": "2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    columns = ("prompt=question",)
    there, _ = read(str(tmp_path / "p.parquet"), *columns)
    here, _ = read(write(tmp_path / "p.jsonl", rows), *columns)
    assert fingerprint(there) == fingerprint(here)


def test_system_and_template(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "1 {x} 1"}])
    prompts, _ = read(path, system="be brief", template="Q: {prompt}\nA:")
    assert prompts[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Q: 1 {x} 1\nA:"},
    ]
    with pytest.raises(ValueError, match="--prompt-template 'Q': expected {prompt}"):
        read(path, template="Q")


def test_wrong_rows_are_counted_and_keep_their_numbers(tmp_path):
    rows = [
        {"prompt": "good 0"},
        "{not json",
        "[1, 2]",
        {"other": "x"},
        {"prompt": ["x"]},
        {"prompt": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "assistant", "content": "only an answer"}]},
        '{"prompt": "\\ud800"}',
        {"prompt": {}},
        {"prompt": "good 9"},
    ]
    prompts, skips = read(write(tmp_path / "p.jsonl", rows))
    assert [(p.number, p.messages[0]["content"]) for p in prompts] == [(0, "good 0"), (9, "good 9")]
    assert sum(skips.counts.values()) == 8
    assert skips.counts["row that is not JSON"] == 1
    assert skips.first["row that is not JSON"].endswith("p.jsonl:2")
    assert skips.counts["message with a lone surrogate, which is no text"] == 1


def test_a_named_answer_column_must_be_there(tmp_path):
    rows = [{"prompt": "a", "gold": "1"}, {"prompt": "b"}]
    prompts, skips = read(write(tmp_path / "p.jsonl", rows), "answer=gold")
    assert len(prompts) == 1 and list(skips.counts.values()) == [1]


@pytest.mark.parametrize("item", ["prompt", "prompt=", "reply=x", "=x"])
def test_columns_that_say_nothing_are_refused(item):
    with pytest.raises(ValueError, match="--columns"):
        parse_columns([item])


def test_no_usable_row_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no row can be used: 1 × row without a prompt column"):
        read(write(tmp_path / "p.jsonl", [{"x": 1}]))
