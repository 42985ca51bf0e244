"""The whole of a turn trains, whatever ends it; its end and what the template wrote are marked."""

import pytest

from megatron_dft.data.dataset import build_dataset
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.options import DatasetOptions
from megatron_dft.data.schema import RowError, parse_row
from megatron_dft.data.spec import END, KIND_END, KIND_WRITTEN, SUPERVISED, WRITTEN
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import byte_level_tokenizer, chat, write_jsonl
from tests.data.test_chat_mask import MARKED
from tests.data.tool_templates import AS_JSON, AS_XML, calling, chatml, texts

# Reasoning in a message of its own, and another token behind the last answer than behind others.
CHANNELS = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content and loop.last -%}
<|start|>assistant<|note|>{{ m.reasoning_content }}<|end|>
{%- endif -%}
{%- if m.tool_calls -%}<|start|>assistant<|to|>{{ m.tool_calls[0].function | tojson }}<|call|>
{%- else -%}
<|start|>assistant<|say|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif -%}
{%- endif -%}
{%- else -%}<|start|>{{ m.role }}<|say|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
SPECIALS = ("<|start|>", "<|note|>", "<|say|>", "<|to|>", "<|call|>", "<|end|>", "<|return|>")


def _channels(template=CHANNELS):
    tokenizer = byte_level_tokenizer(template, SPECIALS, eos="<|return|>")
    return tokenizer, ChatEncoder(encoder_spec(tokenizer))


def test_reasoning_and_answer_train_to_the_last_end():
    messages = chat("7*8?", "56")
    messages[1]["reasoning_content"] = "7*7+7"
    (trained,) = texts(_channels(), {"messages": messages})
    assert trained == "<|note|>7*7+7<|end|><|start|>assistant<|say|>56<|return|>"
    (ends,) = texts(_channels(), {"messages": messages}, END)
    assert ends == "<|return|>"


def test_a_turn_whose_end_changes_when_another_follows_is_a_sample_of_its_own():
    messages = chat("7*8?", "56", "And 2?", "58")
    got = texts(_channels(), {"messages": messages})
    assert got == ["<|say|>56<|return|>", "<|say|>58<|return|>"]


def test_a_call_ends_with_a_token_of_its_own():
    messages = calling(None)[:2]
    messages[1]["reasoning_content"] = "so"
    (trained,) = texts(_channels(), {"messages": messages})
    assert trained.startswith("<|note|>so<|end|><|start|>assistant<|to|>")
    assert trained.endswith("<|call|>") and '"lake": "Onega"' in trained
    assert texts(_channels(), {"messages": messages}, END) == ["<|call|>"]


def test_end_tokens_in_the_rows_own_text_end_nothing():
    messages = chat("q", "a<|return|>b<|end|>c")
    (trained,) = texts(_channels(), {"messages": messages})
    assert trained == "<|say|>a<|return|>b<|end|>c<|return|>"
    assert texts(_channels(), {"messages": messages}, END) == ["<|return|>"]


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("turn", range(5))
def test_end_tokens_in_the_rows_own_text_are_said(turn, key):
    messages = chat("q", "a", "r", "b", "never seen")
    messages[turn][key] = "x<|end|>y"
    conversation = parse_row({"messages": messages}, None)
    _channels()[1].render(conversation)
    expected = {
        0: ["prompts hold <|end|> in their text: it reads as the end of a turn"],
        1: ["answers hold <|end|> in their text: generation will stop there"],
        4: [],  # behind the last answer
    }
    assert conversation.notes == expected[turn if turn == 4 else turn % 2]


def test_a_last_turn_without_an_end_is_refused():
    open_ended = CHANNELS.replace("<|return|>", "")
    with pytest.raises(ValueError, match="plain conversation: .* no end-of-turn token behind it"):
        _channels(open_ended)
    # Only where the row's own text holds the token, and the template writes none behind it.
    unless = "{% if loop.last %}{% if 'x' not in m.content %}<|return|>{% endif %}"
    sometimes = CHANNELS.replace("{% if loop.last %}<|return|>", unless)
    with pytest.raises(RowError, match="message 1: the template writes no end-of-turn token"):
        texts(_channels(sometimes), {"messages": chat("q", "x<|end|>y")})


def test_marks_that_leave_out_the_last_end_are_refused():
    head, tail = MARKED.split("'<|im_end|>' }}{% endgen")
    other = head + "('' if loop.last else '<|im_end|>') }}{% endgen" + tail
    other = other.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|endoftext|>' }}")
    with pytest.raises(ValueError, match="generation marks leave out '<.endoftext.>' behind"):
        chatml(other)


ENDS = {
    "llama3": "<|eot_id|>", "smollm2": "<|im_end|>", "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>", "phi3": "<|end|>",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_ends_and_written_tokens_are_marked(name):
    tokenizer = FAMILIES[name].tokenizer()
    pair = tokenizer, ChatEncoder(encoder_spec(tokenizer))
    messages = chat("What?", "It is this.", "And?", "That.")
    ends, written = (texts(pair, {"messages": messages}, f) for f in (END, WRITTEN))
    assert "".join(ends) == ENDS[name] * 2
    if name == "qwen3":  # the block of reasoning is the template's, where there is no reasoning
        assert written == ["<think>\n\n</think>\n\n" + ENDS[name]] * 2
    elif name == "mistral":  # whose template begins an answer with a space, a token here
        assert written == [" </s> </s>"]
    else:
        assert "".join(written) == ENDS[name] * 2


def test_what_the_template_writes_around_a_call_is_marked_and_what_the_row_says_is_not():
    messages = calling("Let me look.")
    messages[1]["reasoning_content"] = "so"
    (written,) = texts(chatml(AS_JSON), {"messages": messages}, WRITTEN)
    for own in ("so", "Let me look.", "depth", "Onega", "127 metres."):
        assert own not in written
    for template in ("<think>", "</think>", '<call>{"name": "', '", "arguments": ', "}</call>"):
        assert template.strip('"') in written, template
    # Arguments that the template took apart: only what is certain counts.
    assert texts(chatml(AS_XML), {"messages": calling(None)}, WRITTEN) == ["<|im_end|><|im_end|>"]


def test_a_space_of_the_template_that_merges_with_the_answer_is_the_answers():
    tokenizer = FAMILIES["mistral"].tokenizer()
    encoder = ChatEncoder(encoder_spec(tokenizer))
    (flagged,) = encoder.encode(encoder.render(parse_row({"messages": chat("a", "the")}, None)))
    assert ((flagged & WRITTEN) != 0).sum() == 1 and ((flagged & SUPERVISED) != 0).sum() >= 2


def test_marks_and_prefixes_mark_the_same_tokens():
    row = {"messages": chat("a", "b c", "d", " e\n")}
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for flag in (END, WRITTEN, SUPERVISED):
        assert texts(chatml(MARKED), row, flag) == texts(chatml(plain), row, flag)


def test_marks_of_which_nobody_knows_the_turn_still_mark_their_ends():
    twice = MARKED.replace("{% generation %}", "{% generation %}<|im_start|>{% endgeneration %}"
                           "{% generation %}")  # fmt: skip
    row = {"messages": chat("a", "b", "c", "d")}
    assert texts(chatml(twice), row, END)[0].count("<|im_end|>") == 2
    row["messages"][1]["weight"] = 0.5
    with pytest.raises(RowError, match="a weight of its own cannot be told from the others"):
        texts(chatml(twice), row)


@pytest.mark.parametrize("pad_multiple", [1, 4])
def test_rows_carry_the_kind_of_each_label(tmp_path, pad_multiple):
    tokenizer = FAMILIES["qwen3"].tokenizer()
    rows = [{"messages": chat(f"q{i}", f"a{i}")} for i in range(5)]
    rows.append({"prompt": "p", "completion": "c"})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = build_dataset(
        [path], tokenizer, DatasetOptions(seq_length=128, pad_multiple=pad_multiple)
    )
    ends, total = 0, 0
    for index in range(data.rows_per_pass):
        row = data[index]
        kinds, labels = row["token_kinds"], row["labels"]
        is_end = (kinds & KIND_END) != 0
        assert (labels[is_end] == tokenizer.eos_token_id).all()
        assert ((kinds == 0) | (row["loss_mask"] > 0)).all()
        assert ((kinds & KIND_WRITTEN) != 0)[is_end].all()
        ends, total = ends + int(is_end.sum()), total + int((kinds > 0).sum())
    assert ends == 6
    thinking = len(tokenizer("<think>\n\n</think>\n\n")["input_ids"])
    assert total == 6 + 5 * thinking
