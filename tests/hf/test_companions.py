"""The files beside the weights: transformers, by its defaults, finds what the run trained with."""

import json
from pathlib import Path

import pytest

from megatron_dft.hf import companions
from megatron_dft.hf.companions import TrainedChat
from megatron_dft.hf.source import HFCheckpoint
from tests.hf.tiny import CHAT_TEMPLATE, tiny_tokenizer

OWN = "{% for m in messages %}own {{ m.content }}{% endfor %}"
EOS_OF_BASE, END = 256, 258


@pytest.fixture
def base(tmp_path) -> Path:
    """A base model's files without weights: its eos is the pad token, its template `OWN`."""
    directory = tmp_path / "base"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(directory)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259}
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": EOS_OF_BASE}))
    return directory


def opened(directory: Path) -> HFCheckpoint:
    config = json.loads((directory / "config.json").read_text())
    return HFCheckpoint(directory, "base", None, config, {})


def exported(base: Path, chat: TrainedChat | None = None) -> Path:
    out = base.parent / "out"
    out.mkdir()
    companions.check(opened(base))
    companions.write(opened(base), out, chat)
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    return out


def template_of(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).chat_template


def ends_of(directory: Path):
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(directory).eos_token_id


def give_old_forms(base: Path) -> None:
    """A second template, and copies in every place where a release once kept templates."""
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = OWN
    (base / "tokenizer_config.json").write_text(json.dumps(config))


def test_untrained_files_are_the_base_models(base):
    give_old_forms(base)
    out = exported(base)
    names = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    assert all((out / n).read_bytes() == (base / n).read_bytes() for n in names)
    assert template_of(out) == {"default": OWN, "tool_use": "tools"}


def test_the_template_trained_with_is_the_only_one(base):
    give_old_forms(base)
    # Line ends of another system, and text outside ASCII.
    trained = CHAT_TEMPLATE + "{# ende – 終 #}\r\n"
    out = exported(base, TrainedChat({"default": trained}))
    assert (out / "chat_template.jinja").read_bytes().decode() == trained
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == trained
    assert not (out / "additional_chat_templates").exists()
    assert OWN not in "".join(p.read_text() for p in out.iterdir())


def test_a_base_without_a_template_gets_one(base):
    (base / "chat_template.jinja").unlink()
    assert template_of(base) is None
    assert template_of(exported(base, TrainedChat({"default": CHAT_TEMPLATE}))) == CHAT_TEMPLATE


def test_named_templates_leave_by_their_names(base):
    both = {"default": CHAT_TEMPLATE, "tool_use": OWN}
    assert template_of(exported(base, TrainedChat(both))) == both


@pytest.mark.parametrize(
    ("of_base", "expected"),
    [
        (EOS_OF_BASE, [EOS_OF_BASE, END, 255]),
        ([EOS_OF_BASE, END], [EOS_OF_BASE, END, 255]),
        (None, [END, 255]),
    ],
)
def test_every_end_of_a_turn_ends_generation(of_base, expected, base):
    settings = {"eos_token_id": of_base, "max_new_tokens": 77}
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = exported(base, TrainedChat(end_tokens=(END, 255)))
    assert ends_of(out) == expected
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_without_generation_settings_the_ids_of_the_config_count(base):
    out = exported(base, TrainedChat(end_tokens=(END,)))
    assert ends_of(out) == [EOS_OF_BASE, END]


def test_a_base_that_stops_already_keeps_its_file(base):
    text = '{"eos_token_id": [258, 256],   "top_p": 0.9}'
    (base / "generation_config.json").write_text(text)
    out = exported(base, TrainedChat(end_tokens=(END,)))
    assert (out / "generation_config.json").read_text() == text


def test_no_end_of_a_turn_is_suppressed(base):
    settings = {
        "eos_token_id": END,
        "suppress_tokens": [1, END],
        "begin_suppress_tokens": [END],
        "bad_words_ids": [[2, END], [END]],
    }
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = exported(base, TrainedChat(end_tokens=(END,)))
    assert json.loads((out / "generation_config.json").read_text()) == {
        "eos_token_id": END,
        "suppress_tokens": [1],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[2, END]],
    }


def test_code_goes_along_where_it_is_asked_for(base):
    (base / "configuration_tiny.py").write_text("x = 1")
    out = exported(base)
    assert not list(out.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(content | {"auto_map": {"A": "configuration_tiny.A"}}))
        again = base.parent / name
        again.mkdir()
        companions.write(opened(base), again, None)
        assert (again / "configuration_tiny.py").read_text() == "x = 1"
        (base / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("generation_config.json", "{", "JSON"),
        ("generation_config.json", "[1]", "JSON object"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "token id"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', "token id"),
        ("generation_config.json", '{"eos_token_id": -1}', "token id"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', "token id"),
        ("generation_config.json", "[" * 100_000, "JSON"),
        ("tokenizer_config.json", '"x"', "JSON object"),
        ("config.json", '{"eos_token_id": 1e999}', "token id"),
    ],
)
def test_a_broken_file_is_one_line_before_the_run(name, text, word, base):
    (base / name).write_text(text)
    with pytest.raises(ValueError) as refusal:
        companions.check(opened(base))
    assert str(base / name) in str(refusal.value) and word in str(refusal.value)
    assert "\n" not in str(refusal.value)
