"""Every layout of rows and every kind of file gives the same conversations."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.readers import read_batches
from megatron_dft.data.schema import RowError, detect_format, parse_row
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import byte_level_tokenizer, chat, chatml_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


def _prepare(path, tokenizer, **options):
    return prepare(parse_sources([path]), encoder_spec(tokenizer), PrepareOptions(**options))[0]


def _texts(store, tokenizer):
    """(whole text, trained text) of each conversation."""
    out = []
    for i in range(len(store)):
        flagged = store.flagged(i)
        ids, trained = flagged & ID_MASK, (flagged & SUPERVISED) != 0
        out.append((tokenizer.decode(ids), tokenizer.decode(ids[trained])))
    return out


# -- layouts --------------------------------------------------------------------------------------

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
    assert _texts(_prepare(path, tokenizer), tokenizer) == [("Q: 1+1\nA: 2</s>", " 2</s>")]


def test_text_prompts_begin_with_bos_where_the_tokenizer_begins_so(tmp_path):
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(FAMILIES["mistral"].template, ("<s>", "</s>"), "</s>", "<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "completion": "2"}])
    assert _texts(_prepare(path, tokenizer), tokenizer) == [("<s>2</s>", "2</s>")]


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


# -- files ----------------------------------------------------------------------------------------

ROWS = [
    {"messages": chat(f"q{i} é🙂", f"a{i}\n", *(("more", "b") if i % 2 else ()))} for i in range(40)
]


def _jsonl_bytes(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def _write(kind, directory, rows):
    path = directory / f"data.{kind}"
    raw = _jsonl_bytes(rows)
    if kind == "jsonl":
        path.write_bytes(raw)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(raw))
    elif kind == "jsonl.zst":
        half = len(raw) // 2  # two frames, as appending tools write them
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(raw[:half]) + compress(raw[half:]))
    elif kind in ("json", "json.gz"):
        text = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(text) if kind == "json.gz" else text)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "saved splits":
        train = datasets.Dataset.from_list(rows)
        datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(path)
    elif kind == "directory":
        path.mkdir()
        (path / "a.jsonl").write_bytes(_jsonl_bytes(rows[:15]))
        (path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl_bytes(rows[15:])))
        (path / "notes.txt").write_text("not data")
    return str(path)


KINDS = [
    "json",
    "json.gz",
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "parquet",
    "saved",
    "saved splits",
    "directory",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_conversations(tmp_path, tokenizer, kind):
    path = _write(kind, tmp_path, ROWS)
    store = _prepare(path, tokenizer, cache_dir=tmp_path / "cache")
    texts = _texts(store, tokenizer)
    assert [t for _, t in texts] == [
        "".join(m["content"] + "<|im_end|>" for m in r["messages"] if m["role"] == "assistant")
        for r in ROWS
    ]
    where = store.where(20)
    assert where == {"directory": f"{path}/b.jsonl.gz:6"}.get(kind, f"{path}:21")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_truncated_file_is_refused_whatever_the_mode(tmp_path, tokenizer, kind):
    rows = [{"messages": chat(f"q{i} {i * 7919 % 1009}", f"a{i * i}")} for i in range(3000)]
    path = _write(kind, tmp_path, rows)
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) - 200)
    for errors in ("strict", "skip"):
        with pytest.raises(ValueError, match="truncated or damaged|not a whole Parquet") as caught:
            _prepare(path, tokenizer, errors=errors, max_bad_rows=0.5, cache_dir=tmp_path / "c")
        assert str(caught.value).startswith(path) and "\n" not in str(caught.value)
    assert not list((tmp_path / "c" / "tokens").glob("*/meta.json"))


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr("megatron_dft.data.json_array._READ_BYTES", chunk)
    rows = [{"a": ["é🙂", 1.5e3, -12, True, None]}, {}, {"b": "]},[{"}, 12345]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n")
    (batch,) = read_batches(parse_sources([path])[0])
    assert batch.rows == rows and batch.numbers == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text, fault",
    [
        ('[{"a": 1}, {"b": ', "element 2 of the array: not JSON"),
        ('[{"a": 1} {"b": 2}]', "element 2 of the array: a JSON array needs , or ] behind"),
        ('[{"a": 1}, {"b": NaN}]', "element 2 of the array: it holds NaN"),
        ('[{"a": 1}', "element 2 of the array: a JSON array needs"),
        ("[]", "the file holds no rows"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_broken_array_is_refused(tmp_path, text, fault):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(read_batches(parse_sources([tmp_path / "a.json"])[0]))
    assert fault in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/a.json: ")


def test_a_bad_element_of_an_array_is_a_bad_row(tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], {"messages": chat("no answer")}, 3]))
    with pytest.raises(ValueError, match="a.json:2: it has no assistant turn"):
        _prepare(str(path), tokenizer)
    store = _prepare(str(path), tokenizer, errors="skip", max_bad_rows=2)
    assert len(store) == 1 and store.meta["counts"]["bad_rows"] == 2


def test_what_is_not_compressed_is_named(tmp_path, tokenizer):
    for kind in ("jsonl.gz", "jsonl.zst", "parquet"):
        path = tmp_path / f"data.{kind}"
        path.write_bytes(_jsonl_bytes(ROWS))
        with pytest.raises(ValueError, match=f"data.{kind}"):
            _prepare(str(path), tokenizer)


def test_bad_rows_of_parquet_are_numbered(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    columns = {"instruction": ["a", "b", "c"], "output": ["x", None, "z"]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=r'a.parquet:2: "output" must be text, but is null'):
        _prepare(str(path), tokenizer)


def test_batches_stay_small_however_large_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dft.data.readers.BATCH_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    batches = list(read_batches(parse_sources([path])[0]))
    assert len(batches) > 3 and [n for b in batches for n in b.numbers] == list(range(1, 41))
    assert all(sum(map(len, b.rows)) < 1400 for b in batches)
    assert sum(b.size for b in batches) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    "items, fault",
    [
        ([], "--train-data names no data"),
        (["nothere.jsonl"], "'nothere.jsonl' does not exist"),
        (["0:{a}"], "the weight must be above 0"),
        (["0.5:{a}", "{a}"], "has a weight and .* has none"),
        (["{a}.txt"], "unknown kind of file; expected .jsonl"),
        (["{empty}"], "a directory without .jsonl or .parquet files"),
        (["no/such-hub-name"], "data set 'no/such-hub-name' cannot be loaded: .*without network"),
        (["{splits}"], r"has the splits \['test'\] and no 'train'; name one"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(tmp_path, tokenizer, items, fault):
    a = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "splits")
    names = {"a": a, "empty": tmp_path / "empty", "splits": tmp_path / "splits"}
    with pytest.raises(ValueError, match=fault) as caught:
        sources = parse_sources([i.format(**names) for i in items])
        prepare(sources, encoder_spec(tokenizer), PrepareOptions())
    assert "\n" not in str(caught.value)


def test_a_path_with_a_colon_is_a_path(tmp_path):
    path = write_jsonl(tmp_path / "a:b.jsonl", ROWS)
    (source,) = parse_sources([f"2.5:{path}"])
    assert (source.name, source.weight) == (path, 2.5)
    assert parse_sources([path])[0].weight is None
