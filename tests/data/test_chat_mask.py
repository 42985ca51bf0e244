"""Masks against conversations written out by hand, for templates of every known kind."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import RowError
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import (
    CHATML_SPECIALS,
    CHATML_TEMPLATE,
    byte_level_tokenizer,
    chat,
    chatml_tokenizer,
)
from tests.data.masks import MARKED, SPACED, _encoder, _marked, assert_conversation, encode


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_family_trains_exactly_the_answers_and_their_ends(name, system, turns):
    if system and not FAMILIES[name].system:
        return
    contents = ["What is 12 + 7?", "It is 19.\n\nDone", "And 2?", "  two  ", "Ok", "Bye 🙂"]
    assert_conversation(name, chat(*contents[: 2 * turns], system=system))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.tools])
def test_tool_calls_train_and_their_answers_do_not(name):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": "é"}}}
    messages = [
        {"role": "user", "content": "12 + é?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"result": 19}'},
        {"role": "tool", "content": "again"},
        {"role": "assistant", "content": "19"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ]
    assert_conversation(name, messages)


def test_reasoning_survives_in_the_sample_of_its_own_turn():
    messages = chat("1+1?", "2", "2+2?", "4")
    for m, thought in zip(messages, ["", "one and one", "", "two and two"], strict=True):
        if thought:
            m["reasoning_content"] = thought
    got = assert_conversation("qwen3", messages)
    tokenizer, _ = _encoder("qwen3")
    texts = [tokenizer.decode((f & ID_MASK)[(f & SUPERVISED) != 0]) for f in got]
    assert texts == [
        "<think>\none and one\n</think>\n\n2<|im_end|>",
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
    ]


def test_a_template_that_rewrites_can_be_refused():
    tokenizer, _ = _encoder("qwen3")
    encoder = ChatEncoder(encoder_spec(tokenizer, rewrites="refuse"))
    assert len(encode(encoder, {"messages": chat("a", "b")})) == 1
    with pytest.raises(RowError, match="rewrites an earlier turn .* --chat-rewrites per-turn"):
        encode(encoder, {"messages": chat("a", "b", "c", "d")})


@settings(max_examples=60, deadline=None)
@given(st.lists(SPACED.map("".join), min_size=2, max_size=6).filter(lambda x: len(x) % 2 == 0))
@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_trains_exactly(name, contents):
    assert_conversation(name, chat(*contents))


def test_newlines_that_would_merge_with_the_header_are_the_answers_own():
    tokenizer = chatml_tokenizer()
    encoder = ChatEncoder(encoder_spec(tokenizer))
    assert len(tokenizer("\n\n")["input_ids"]) == 1, "the fixture must be able to merge newlines"
    (flagged,) = encode(encoder, {"messages": chat("q", "\nanswer")})
    trained = (flagged & ID_MASK)[(flagged & SUPERVISED) != 0]
    assert tokenizer.decode(trained) == "\nanswer<|im_end|>"
    # As at inference: the prompt is tokenised alone, then the answer follows.
    prompt = tokenizer.apply_chat_template(
        chat("q"), add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert (flagged & ID_MASK)[: len(prompt)].tolist() == prompt


def test_a_header_token_that_swallows_spaces_leaves_the_answer_its_own():
    """Phi 3's own special tokens strip the spaces behind them, the answer's first ones too."""
    tokenizer = FAMILIES["phi3"].tokenizer()
    spec = encoder_spec(tokenizer)
    layout = json.loads(spec.tokenizer_json)
    for token in layout["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|assistant|>", "<|end|>")
    encoder = ChatEncoder(dataclasses.replace(spec, tokenizer_json=json.dumps(layout)))
    (flagged,) = encode(encoder, {"messages": chat("q", "\n answer", "r", "two")})
    trained = tokenizer.decode((flagged & ID_MASK)[(flagged & SUPERVISED) != 0])
    assert trained == "\n answer<|end|>two<|end|>"


def test_a_mark_that_ends_inside_a_token_takes_it_as_transformers_does():
    template = MARKED.replace("'<|im_end|>' }}{% endgen", "'<|im_end|>\n' }}{% endgen")
    tokenizer, encoder = _marked(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    messages = chat("q", "a", "r", "b")
    expected = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    (flagged,) = encode(encoder, {"messages": messages})
    assert "\n\n" in tokenizer.decode((flagged & ID_MASK)[(flagged & SUPERVISED) != 0])
    mask = ((flagged & SUPERVISED) != 0).astype(int).tolist()
    assert mask == expected["assistant_masks"][: len(flagged)]
    assert not any(expected["assistant_masks"][len(flagged) :])


@pytest.mark.parametrize("switch", [{"train": False}, {"weight": 0}])
def test_a_turn_can_be_left_out(switch):
    tokenizer, encoder = _encoder("llama3")
    messages = chat("a", "first", "b", "second", "c", "third")
    for left_out, kept in ((1, "second|third"), (3, "first|third"), (5, "first|second")):
        marked = [dict(m, **(switch if i == left_out else {})) for i, m in enumerate(messages)]
        (flagged,) = encode(encoder, {"messages": marked})
        trained = tokenizer.decode((flagged & ID_MASK)[(flagged & SUPERVISED) != 0])
        assert trained == kept.replace("|", "<|eot_id|>") + "<|eot_id|>"


@pytest.mark.parametrize(
    "contents", [("Hi", "Hello"), ("a", "b c\n\nd", "e", " f 🙂"), ("q", "\nx")]
)
def test_generation_marks_train_what_transformers_says(contents):
    tokenizer, encoder = _marked()
    messages = chat(*contents, system="s")
    # transformers loses a turn that begins with a space where the offsets are trimmed.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    expected = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    (flagged,) = encode(encoder, {"messages": messages})
    if not contents[1].startswith("\n"):
        assert (flagged & ID_MASK).tolist() == expected["input_ids"][: len(flagged)]
        mask = ((flagged & SUPERVISED) != 0).astype(int).tolist()
        assert mask == expected["assistant_masks"][: len(flagged)]
        assert not any(expected["assistant_masks"][len(flagged) :])
    plain = ChatEncoder(encoder_spec(chatml_tokenizer()))
    assert encode(plain, {"messages": messages})[0].tolist() == flagged.tolist()


def test_marks_honour_turns_that_are_left_out():
    tokenizer, encoder = _marked()
    messages = chat("a", "b", "c", "d")
    messages[1]["train"] = False
    (flagged,) = encode(encoder, {"messages": messages})
    assert tokenizer.decode((flagged & ID_MASK)[(flagged & SUPERVISED) != 0]) == "d<|im_end|>"


def test_marks_inside_a_macro_are_where_the_text_lands():
    head, rest = MARKED.split("{% generation %}")
    body, tail = rest.split("{% endgeneration %}")
    macro = "{% macro said(message) %}{% generation %}" + body + "{% endgeneration %}{% endmacro %}"
    tokenizer, encoder = _marked(macro + head + "{{ said(message) }}" + tail)
    _, direct = _marked()
    row = {"messages": chat("a", "b c", "d", "e")}
    assert encode(encoder, row)[0].tolist() == encode(direct, row)[0].tolist()


@pytest.mark.parametrize(
    "template, fault",
    [
        (MARKED.replace(" + '<|im_end|>' }}{% endgen", " }}{% endgen").replace(
            "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"),
         "generation marks leave out '<|im_end|>'"),
        (CHATML_TEMPLATE.replace("'<|im_end|>'", "''").replace("'<|im_start|>'", "'# '"),
         "writes no special token behind an assistant turn"),
        ("{{ raise_exception('never') }}", "cannot render a plain two-turn conversation: .*never"),
        ("{{ 'constant' }}", "does not print the messages"),
        ("{% for m in messages %}", "not valid Jinja: line 1"),
    ],
)  # fmt: skip
def test_templates_that_cannot_give_a_right_mask_are_refused(template, fault):
    with pytest.raises(ValueError, match=fault):
        _marked(template)


def test_a_prompt_that_does_not_begin_the_turn_is_refused():
    prompt = "{{ '<|im_start|>assistant\n' }}"
    opened = CHATML_TEMPLATE.replace(prompt, "{{ '<|im_start|>assistant\n<think>\n' }}")
    for template in (opened, CHATML_TEMPLATE + " "):
        with pytest.raises(ValueError, match="generation prompt does not begin its rendering"):
            _marked(template)
    # Without an end of its own, an answer ends where the next question begins.
    endless = CHATML_TEMPLATE.replace("'<|im_end|>' + '\n'", "'\n'")
    with pytest.raises(ValueError, match="plain conversation: message 1: .* no end-of-turn token"):
        _marked(endless)
    # Only some rows: the prompt opens a block for questions about x alone.
    sometimes = CHATML_TEMPLATE.replace(
        prompt, prompt + "{% if 'x' in messages[-1].content %}{{ '<think>' }}{% endif %}"
    )
    _, encoder = _marked(sometimes)
    assert len(encode(encoder, {"messages": chat("a", "b")})) == 1
    with pytest.raises(RowError, match="message 1: .* prompt does not begin its rendering"):
        encode(encoder, {"messages": chat("x", "b")})


def test_todays_date_is_refused_until_it_is_fixed():
    dated = (
        "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML_TEMPLATE
    )
    with pytest.raises(ValueError, match="--template-date YYYY-MM-DD"):
        _marked(dated)
    tokenizer = byte_level_tokenizer(dated, CHATML_SPECIALS, eos="<|im_end|>")
    encoder = ChatEncoder(encoder_spec(tokenizer, template_date="2024-07-26"))
    (flagged,) = encode(encoder, {"messages": chat("a", "b")})
    assert "26 Jul 2024" in tokenizer.decode(flagged & ID_MASK)


def test_what_the_template_refuses_is_a_bad_row():
    _, encoder = _encoder("gemma")
    with pytest.raises(RowError, match="the chat template refuses it: System role not supported"):
        encode(encoder, {"messages": chat("a", "b", system="s")})


def test_variables_reach_the_template():
    template = "{% if shout %}{{ '!' }}{% endif %}" + CHATML_TEMPLATE
    tokenizer = byte_level_tokenizer(template, CHATML_SPECIALS, eos="<|im_end|>")
    encoder = ChatEncoder(encoder_spec(tokenizer, template_args={"shout": True}))
    (flagged,) = encode(encoder, {"messages": chat("a", "b")})
    assert tokenizer.decode(flagged & ID_MASK).startswith("!")


@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_is_transformers_own(name):
    tokenizer, encoder = _encoder(name)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    for messages in (chat("Hi <b>", "Ho & é"), chat("a\n", " b", "c", "d")):
        for given_tools in (None, tools if FAMILIES[name].tools else None):
            for prompt in (False, True):
                ours = encoder.renderer.template.render(
                    messages, given_tools, add_generation_prompt=prompt
                )
                theirs = tokenizer.apply_chat_template(
                    messages, tools=given_tools, tokenize=False, add_generation_prompt=prompt
                )
                assert ours == theirs


def test_what_was_done_with_a_tokenizer_before_changes_nothing():
    tokenizer = chatml_tokenizer()
    fresh = encoder_spec(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    used = encoder_spec(tokenizer)
    assert used.tokenizer_json == fresh.tokenizer_json
    (flagged,) = encode(ChatEncoder(used), {"messages": chat("a", "a long answer")})
    assert tokenizer.decode(flagged & ID_MASK).endswith("a long answer<|im_end|>")


def test_the_spec_is_plain_data():
    spec = encoder_spec(chatml_tokenizer())
    assert json.loads(json.dumps(spec.__dict__, default=dict))["rewrites"] == "per-turn"
