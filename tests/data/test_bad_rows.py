"""Every kind of bad row stops the run with file, line and reason, or is left out and counted."""

import json

import pytest

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl

GOOD = json.dumps({"messages": chat("What?", "This.")}).encode()


def _row(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}).encode()


def _said(role, content, **extra):
    return {"role": role, "content": content, **extra}


USER, ANSWER = _said("user", "u"), _said("assistant", "a")
BAD = {
    "not json": (b'{"messages": [', "not JSON: Expecting value at character 14"),
    "not an object": (b'["a"]', "a row must be a JSON object, not a list"),
    "not utf-8": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at 14"),
    "lone surrogate": (
        b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
        "message 0: content holds the lone surrogate U+D800 at character 1",
    ),
    "nul": (_row(_said("user", "a\0"), ANSWER), "message 0: content holds a NUL"),
    "nan": (b'{"messages": NaN}', "it holds NaN, which is not JSON"),
    "infinity": (b'{"messages": [], "x": -Infinity}', "it holds -Infinity"),
    "no columns": (b'{"text": "a"}', "columns [text] show no known layout"),
    "two layouts": (
        b'{"messages": [], "conversations": []}',
        "columns [conversations, messages] fit several layouts (messages, sharegpt)",
    ),
    "no list": (b'{"messages": "hello"}', '"messages" must be a list, but is text'),
    "no message": (b'{"messages": ["hello"]}', "message 0 must be an object, not text"),
    "no turn": (_row(), "it has no assistant turn"),
    "no assistant": (_row(USER), "it has no assistant turn"),
    "assistant first": (_row(ANSWER, USER), "wrong role order: message 0 (assistant) comes first"),
    "user twice": (_row(USER, USER, ANSWER), "wrong role order: message 1 (user) follows user"),
    "late system": (
        _row(USER, _said("system", "s"), ANSWER),
        "wrong role order: message 1 (system) follows user",
    ),
    "unknown role": (_row(_said("bot", "s")), "message 0: role 'bot'; expected one of system"),
    "empty answer": (_row(USER, _said("assistant", " ")), "message 1 (assistant): empty content"),
    "empty question": (_row(_said("user", ""), ANSWER), "message 0 (user): empty content"),
    "content number": (
        _row(USER, _said("assistant", 3)),
        "message 1: content must be text, not a number",
    ),
    "image part": (
        _row(_said("user", [{"type": "image"}]), ANSWER),
        "message 0: content has parts that are not text",
    ),
    "nothing trains": (
        _row(USER, _said("assistant", "a", train=False)),
        "every assistant turn is left out by train: false or weight: 0",
    ),
    "odd weight": (
        _row(USER, _said("assistant", "a", weight=-0.5)),
        "message 1: weight must be a number of at least 0 that fp32 holds, not -0.5",
    ),
    "tiny weight": (
        _row(USER, _said("assistant", "a", weight=1e-60)),
        "message 1: weight must be a number of at least 0 that fp32 holds",
    ),
    "word for weight": (
        _row(USER, _said("assistant", "a", weight="1")),
        "message 1: weight must be a number of at least 0, not '1'",
    ),
    "odd row weight": (_row(USER, ANSWER, weight=True), '"weight" must be a number'),
    "mask by character": (
        _row(USER, _said("assistant", "a", train_detail=[{"begin_offset": 0}])),
        "message 1: train_detail masks by character",
    ),
    "long integer": (b'{"messages": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "odd train": (
        _row(USER, _said("assistant", "a", train="no")),
        "message 1: train must be true or false",
    ),
    "odd tools": (_row(USER, ANSWER, tools="{"), '"tools" is not JSON'),
    "too deep": (b'{"messages": ' + b"[" * 100_000, "JSON nested too deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_strict_names_file_line_and_reason(tmp_path, name):
    raw, reason = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, raw, GOOD, b""]))
    with pytest.raises(ValueError) as caught:
        build_dataset([path], chatml_tokenizer(), DatasetOptions(seq_length=64, packing=False))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {reason}") and "\n" not in message
    assert message.endswith("leave bad rows out with --data-errors skip")


def test_skip_leaves_out_and_counts_up_to_the_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 96 + [raw for raw, _ in list(BAD.values())[:4]]))

    def build(limit):
        return build_dataset(
            [path],
            chatml_tokenizer(),
            DatasetOptions(
                seq_length=64,
                packing=False,
                errors="skip",
                max_bad_rows=limit,
            ),
        )

    assert len(build(0.04)) == len(build(4)) == 96
    for limit in (0.039, 3):
        with pytest.raises(ValueError, match=r"4 of 100 rows are bad, more than --max-bad-rows"):
            build(limit)


def test_a_line_of_200_mb_is_refused_unread(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'\n{"messages": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: a line of more than 16 MiB"):
        build_dataset([path], chatml_tokenizer(), DatasetOptions(seq_length=64, packing=False))


def test_an_empty_file_and_a_file_of_blank_lines_are_refused(tmp_path):
    for text in ("", "\n\n"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ValueError, match="rows.jsonl: the file holds no rows"):
            build_dataset(
                [tmp_path / "rows.jsonl"],
                chatml_tokenizer(),
                DatasetOptions(seq_length=64, packing=False),
            )


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n\n" + b"{\n")
    with pytest.raises(ValueError, match="rows.jsonl:3: not JSON"):
        build_dataset([path], chatml_tokenizer(), DatasetOptions(seq_length=64, packing=False))


def test_a_second_source_is_named_too(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("u", "a")}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat("u")}])
    with pytest.raises(ValueError, match="b.jsonl:1: it has no assistant turn"):
        build_dataset([a, b], chatml_tokenizer(), DatasetOptions(seq_length=64, packing=False))
