"""Which tokens end trained turns, and templates that know their own variables."""

import json

import pytest

from megatron_dft.data import end_tokens as module
from megatron_dft.data.end_tokens import end_tokens, probe_end_tokens
from megatron_dft.data.prepare import PrepareOptions, prepare
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.template_defaults import with_defaults
from megatron_dft.data.tokenizer import encoder_spec
from tests.hf.tiny import tiny_tokenizer

PAD, START, END = 256, 257, 258
# Turns with a tool call end otherwise, and the marks take in the line break behind the end.
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% if m.content.startswith('call') %}<|pad|>{% else %}<|im_end|>{% endif %}\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stores(path, rows, spec):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return prepare(parse_sources([str(path)], "--train-data"), spec, PrepareOptions())


def chat(*answers):
    turns = [[("user", "q"), ("assistant", a)] for a in answers]
    return {"messages": [{"role": r, "content": c} for turn in turns for r, c in turn]}


def spec_of(template=None):
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return encoder_spec(tokenizer)


def test_the_usual_end_and_no_special_token_within_an_answer(tmp_path):
    spec = spec_of()
    found = stores(tmp_path / "a.jsonl", [chat("a<|pad|>b", "c")], spec)
    assert end_tokens(found) == (END,)
    assert probe_end_tokens(spec) == (END,)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 1 << 22])
def test_an_end_that_one_row_in_many_has(width, tmp_path, monkeypatch):
    """Wherever the slices that are read at once begin."""
    monkeypatch.setattr(module, "_SLICE_TOKENS", width)
    spec = spec_of(TWO_ENDS)
    rows = [chat("a", "b"), chat("call", "done"), chat("c")]
    assert end_tokens(stores(tmp_path / "a.jsonl", rows, spec)) == (PAD, END)
    assert end_tokens(stores(tmp_path / "b.jsonl", rows[:1], spec)) == (END,)
    assert probe_end_tokens(spec) == (END,)


def test_verbatim_text_ends_with_the_tokenizers_eos(tmp_path):
    """Also where a conversation begins with what trains, right behind the one before."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    spec = encoder_spec(tokenizer)
    rows = [{"prompt": "", "completion": "ab"}, {"prompt": "x", "completion": "y"}]
    assert end_tokens(stores(tmp_path / "a.jsonl", rows, spec)) == (PAD,)


VARIABLES = {
    "think": False,
    "nothing": None,
    "style": 'süß "quoted" {{ x }}\n\U0001f642',
    "depth": {"a": [1, 2.5, True], "b c": None},
    "not-a-name": 1,
}
READS = (
    "{% macro show() %}[{{ think }}|{{ style }}]{% endmacro %}"
    "{%- if think is defined and think is false %}off{% endif %}"
    "{% if nothing is none %}none{% endif %}{{ depth | tojson }}{{ show() }}"
    "{% for m in messages %}{{ m.content }}{{ style }}{% endfor %}"
)


@pytest.mark.parametrize(
    "start", ["", "\n", "  ", "  {% if true %}\n x{% endif %}", "\n\n{# c #}\n"]
)
def test_a_template_renders_by_itself_as_it_did_with_its_variables(start):
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "hi"}]

    def render(template, **variables):
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **variables
        )

    plain = start + READS
    alone = with_defaults(plain, VARIABLES)
    named = {k: v for k, v in VARIABLES.items() if k.isidentifier()}
    assert render(alone) == render(plain, **named)
    assert "off" in render(alone) and "off" not in render(alone, think=True)
    assert render(alone, think=True) == render(plain, **(named | {"think": True}))
    assert with_defaults(plain, {}) == plain
