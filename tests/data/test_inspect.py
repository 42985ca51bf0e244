"""inspect-data: right figures, a readable picture, and data that cannot harm who looks at it."""

import json
import struct

import numpy as np
import pytest

from megatron_dft.cli import main
from megatron_dft.data.show import as_html, runs
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.storage.terminal import visible
from tests.data.fixtures import chat, chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok")
    chatml_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def inspect(tmp_path, tokenizer_path, capsys):
    def run(rows, *options, train=True):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        flag = "--train-data" if train else "--valid-data"
        status = main(
            ["inspect-data", "--tokenizer", tokenizer_path, flag, path]
            + ["--data-cache", str(tmp_path / "cache"), *options]
        )
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


ROWS = [{"messages": chat(f"q{i}", "yes " * i, "more", "no")} for i in range(1, 30)]


def test_the_figures_are_right(inspect, tmp_path):
    target = tmp_path / "f.json"
    status, out, err = inspect(ROWS, "--seq-length", "256", "--json", str(target))
    assert (status, err) == (0, "")
    figures = json.loads(target.read_text())
    tokenizer = chatml_tokenizer()
    lengths, supervised = [], 0
    for row in ROWS:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        lengths.append(len(tokenizer(text.removesuffix("\n"))["input_ids"]))
        for m in row["messages"][1::2]:
            supervised += len(tokenizer(m["content"] + "<|im_end|>")["input_ids"])
    assert figures["rows"] == figures["conversations"] == 29
    assert figures["tokens"] == sum(lengths) and figures["supervised_tokens"] == supervised
    assert figures["lengths"]["p100"] == max(lengths) and figures["lengths"]["p0"] == min(lengths)
    real = sum(n - 1 for n in lengths)
    assert figures["efficiency"] == pytest.approx(real / (figures["packed_rows"] * 256))
    assert figures["padded_efficiency"] == pytest.approx(real / (29 * 256))
    assert f"supervised          {supervised:,}" in out and "bad rows" not in out


def test_what_training_would_refuse_is_said_and_the_rest_still_shown(inspect):
    bad = [{"messages": chat("a")}, {"messages": chat("b")}, {"x": 1}]
    status, out, err = inspect(ROWS + bad, "--seq-length", "60")
    assert status == 1
    assert "bad rows            2: it has no assistant turn" in out
    assert "a.jsonl:31: it has no assistant turn" in out and "a.jsonl:32: columns [x]" in out
    assert "overlong dropped" in out
    # The lengths are those of all conversations, not of those that fit.
    longest = ROWS[-1]["messages"]
    tokenizer = chatml_tokenizer()
    text = tokenizer.apply_chat_template(longest, tokenize=False).removesuffix("\n")
    assert f"max {len(tokenizer(text)['input_ids'])}" in out
    refusals = err.splitlines()
    assert len(refusals) == 2 and all(r.startswith("training would refuse") for r in refusals)
    assert "a.jsonl:30: it has no assistant turn" in refusals[0]
    assert "are longer than --seq-length 60" in refusals[1]


def test_skipping_within_the_limit_is_no_refusal(inspect):
    row = [{"messages": chat("a")}]
    options = ("--seq-length", "256", "--data-errors", "skip", "--max-bad-rows")
    assert inspect(ROWS + row, *options, "1")[0] == 0
    status, _, err = inspect(ROWS + row * 2, *options, "1")
    assert status == 1 and "2 of 31 rows are bad, more than --max-bad-rows 1" in err


def test_show_marks_what_trains(inspect):
    _, out, _ = inspect(ROWS[:1], "--show", "1")
    assert "a.jsonl:1 (row 0)" in out
    shown = out[out.index("<|im_start|>") :]
    assert shown.strip() == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦yes <|im_end|>⟧\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧"
    )


def test_the_page_escapes_the_data(inspect, tmp_path):
    page = tmp_path / "p.html"
    rows = [{"messages": chat("<script>alert('&')</script>", "</pre><b>\x1b[31m\u202e")}]
    status, out, _ = inspect(rows, "--show", "1", "--html", str(page))
    text = page.read_text()
    assert status == 0 and str(page) in out
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in text
    assert "<mark>&lt;/pre&gt;&lt;b&gt;\\x1b[31m\\u202e&lt;|im_end|&gt;</mark>" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_control_characters_do_not_reach_the_terminal(inspect):
    _, out, _ = inspect([{"messages": chat("a\x1b]0;title\x07", "b\r\x9b2J")}], "--show", "1")
    assert "a\\x1b]0;title\\x07" in out and "⟦b\\r\\x9b2J<|im_end|>⟧" in out
    assert visible("👩\u200d💻\n\t") == "👩\u200d💻\n\t"


def test_special_tokens_inside_answers_are_counted(inspect):
    _, out, _ = inspect([{"messages": chat("a", "b<|endoftext|>c<|im_end|>d")}] * 3)
    assert "special tokens that train: <|endoftext|> 3×, <|im_end|> 3×" in out
    assert "inside answers" not in inspect(ROWS)[1]


def test_the_histogram_is_a_png(inspect, tmp_path):
    picture = tmp_path / "h.png"
    status, out, _ = inspect(ROWS, "--histogram", str(picture))
    head = picture.read_bytes()
    assert status == 0 and str(picture) in out and head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 600 and height > 300


def test_no_data_is_a_users_mistake(tokenizer_path, capsys):
    assert main(["inspect-data", "--tokenizer", tokenizer_path]) == 2
    assert "needs --train-data" in capsys.readouterr().err


def test_validation_data_is_shown_in_file_order(inspect):
    _, out, _ = inspect(ROWS, "--seq-length", "256", "--show", "2", train=False)
    assert "a.jsonl:1 (row 0)" in out


def test_runs_are_maximal():
    tokenizer = chatml_tokenizer()
    ids = np.array(tokenizer("ab cd ef")["input_ids"], dtype=np.uint32)
    flagged = ids.copy()
    flagged[1:3] |= SUPERVISED
    got = runs(flagged, tokenizer)
    assert [t for _, t in got] == [False, True, False]
    assert "".join(t for t, _ in got) == tokenizer.decode((flagged & ID_MASK).tolist())
    assert as_html([("x", got)], "<t>").count("<mark>") == 2
