"""What a template cuts out of an answer's own content is said, and what it only rewrites trains."""

import pytest

from megatron_dft.data.schema import RowError
from tests.data.fixtures import chat
from tests.data.tool_templates import chatml, texts

_HEAD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set parts = m.content.split('</think>') %}"
)
_TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Whatever stands before </think> goes, as DeepSeek V3.1 has it.
CUT = _HEAD + "{{ parts[-1] }}" + _TAIL
# Of earlier answers alone, but all answers train in one text: LFM2.5's way, with marks.
CUT_EARLIER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_WORDS = _HEAD + (
    "{% if parts | length > 1 %}[R]{{ parts[0].split('<think>')[-1] | trim }}[/R]"
    "{{ parts[1] | trim }}{% else %}{{ m.content }}{% endif %}"
) + _TAIL  # fmt: skip
ANSWER_FIRST = OWN_WORDS.replace(
    "[R]{{ parts[0].split('<think>')[-1] | trim }}[/R]{{ parts[1] | trim }}",
    "{{ parts[1] | trim }} since {{ parts[0].split('<think>')[-1] | trim }}",
)
ESCAPED = _HEAD + "{{ m.content | tojson }}" + _TAIL
TRIMMED = _HEAD + "{{ m.content | trim }}" + _TAIL

THOUGHT = "<think>\nBy sevens.\n</think>\n\n56"


@pytest.mark.parametrize("template, turns", [
    (CUT, ["7*8?", THOUGHT]),
    (CUT, ["7*8?", "56", "How?", THOUGHT]),
    (CUT, ["7*8?", "<think>56 or 58</think>56"]),
    (CUT_EARLIER, ["7*8?", THOUGHT, "And 2?", "58"]),
])  # fmt: skip
def test_a_part_of_a_trained_content_that_is_printed_nowhere_is_refused(template, turns):
    lost = "56 or 58" if "58</think>" in turns[-1] else "By sevens."
    turn = 1 + 2 * ("How?" in turns)
    with pytest.raises(
        RowError, match=f"leaves '{lost}' of message {turn}'s content out; .* --chat-drops warn"
    ):
        texts(chatml(template), {"messages": chat(*turns)})


def test_what_is_context_alone_may_be_cut_as_it_is_at_inference():
    messages = chat("7*8?", THOUGHT, "And 2?", "58")
    messages[1]["train"] = False
    assert texts(chatml(CUT), {"messages": messages}) == ["58<|im_end|>"]
    assert texts(chatml(CUT_EARLIER), {"messages": chat("7*8?", THOUGHT)}) == [
        f"{THOUGHT}<|im_end|>"
    ]


def test_with_warn_the_rest_trains_but_never_an_empty_answer():
    pair = chatml(CUT, drops="warn")
    assert texts(pair, {"messages": chat("7*8?", THOUGHT)}) == ["\n\n56<|im_end|>"]
    with pytest.raises(RowError, match="leaves 'By sevens.' of message 1's content out") as error:
        texts(pair, {"messages": chat("7*8?", "<think>By sevens.</think>")})
    assert "--chat-drops" not in str(error.value)


@pytest.mark.parametrize("template, content, trained", [
    (OWN_WORDS, THOUGHT, "[R]By sevens.[/R]56"),
    (ANSWER_FIRST, THOUGHT, "56 since By sevens."),
    (ESCAPED, 'He said "56".\nTwice, été.', r'"He said \"56\".\nTwice, été."'),
    (TRIMMED, "\n  56, \n58  \n", "56, \n58"),
])  # fmt: skip
def test_what_is_only_rewritten_trains(template, content, trained):
    assert texts(chatml(template), {"messages": chat("7*8?", content)}) == [trained + "<|im_end|>"]
