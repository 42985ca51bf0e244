"""Ids beyond the model's embedding, and tokenizers that are loaded as another than their file."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dft.cli import main
from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.scored_text import tokenizer_of
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer, pad_token_id
from megatron_dft.data.tokenizer_backend import check_backend
from megatron_dft.rollout.chat import Rendering
from megatron_dft.rollout.prompt_tokens import PromptTokens
from tests.data.fixtures import chat, chatml_tokenizer, prepare_file, write_jsonl

ROWS = [{"messages": chat("a", "b")}, {"messages": chat("x <extra> y", "b", "c", "d")}]


@pytest.fixture
def extended():
    """A tokenizer with one token more than the model was made for, and that token's id."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer, tokenizer.convert_tokens_to_ids("<extra>")


@pytest.mark.parametrize("cached", [False, True])
def test_an_id_without_a_row_of_the_embedding_is_named(tmp_path, extended, cached):
    tokenizer, extra = extended
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    options = {"cache_dir": tmp_path / "c"} if cached else {}
    prepare_file(path, tokenizer, vocab_size=extra + 1, **options)
    with pytest.raises(ValueError) as caught:  # in a prompt, which never trains
        prepare_file(path, tokenizer, vocab_size=extra, **options)
    assert str(caught.value).startswith(
        f"{path}:2: it holds token {extra} ('<extra>'), and the model's embedding has {extra} rows"
    )
    assert "give the tokenizer and chat template that belong to the model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_that_are_dropped_for_their_length_are_held_to_it_too(tmp_path, extended):
    tokenizer, extra = extended
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="a.jsonl:2: it holds token"):
        build_dataset(
            [path], tokenizer, DatasetOptions(seq_length=20, overlong="drop", vocab_size=extra)
        )


def test_a_pad_token_that_was_added_later_does_not_pad(tmp_path):
    tokenizer = chatml_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token_id(tokenizer) == size
    assert pad_token_id(tokenizer, size) == tokenizer.eos_token_id
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    row = build_dataset([path], tokenizer, DatasetOptions(seq_length=64, vocab_size=size))[0]
    assert row["tokens"].max() < size


def test_inspect_holds_ids_to_the_models_config(tmp_path, extended, capsys):
    tokenizer, extra = extended
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"vocab_size": extra}))
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    words = ["inspect-data", "--hf-model", str(tmp_path / "m"), "--train-data", path]
    assert main([*words, "--data-cache", str(tmp_path / "c")]) == 1
    out, err = capsys.readouterr()
    assert (
        f"a.jsonl:2: it holds token {extra} ('<extra>')" in err and "rows                2" in out
    )


def _spaceless(tokenizer):
    """As transformers 5.3 to 5.21 load a byte-level file whose class says Llama."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_a_tokenizer_that_loses_what_its_file_keeps_is_refused(tmp_path, monkeypatch):
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    check_backend(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json: transformers .* take transformers 5.22"):
        check_backend(_spaceless(tokenizer), tmp_path)
    # It is asked at every loading.
    loaded = _spaceless(tokenizer)
    loaded.chat_template = tokenizer.chat_template
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: loaded)
    for load in (
        load_tokenizer,
        lambda model: tokenizer_of(model, chat=False),
        lambda model: PromptTokens(str(model), Rendering(), False),
    ):
        with pytest.raises(ValueError, match="where the file gives"):
            load(tmp_path)


def test_a_space_before_a_text_that_the_config_asks_for_is_allowed(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    check_backend(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    chatml_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    for text in (whole[:500], "[]", '{"model": 3}', whole.replace('"BPE"', '"Other"')):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_dropout_that_a_file_holds_is_off(tmp_path):
    chatml_tokenizer().save_pretrained(tmp_path)
    text = "What is the sum of twelve and seven? The answer is nineteen. " * 9
    expected = load_tokenizer(tmp_path)(text)["input_ids"]
    file = tmp_path / "tokenizer.json"
    layout = json.loads(file.read_text())
    layout["model"]["dropout"] = 0.5
    file.write_text(json.dumps(layout))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(text)["input_ids"] == expected
    spec = encoder_spec(tokenizer)
    assert json.loads(spec.tokenizer_json)["model"]["dropout"] is None
