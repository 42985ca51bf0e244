"""Chat templates that differ in how they want tool calls, written here, and a row that calls."""

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.fixtures import CHATML_SPECIALS, byte_level_tokenizer

_HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
_TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"

# An object, as JSON, behind whatever content there is.
AS_JSON = TOOLS + _HEAD + (
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</call>{% endfor %}"
) + _TAIL  # fmt: skip
# The text as it is, pasted.
PASTED = TOOLS + _HEAD + (
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name + ' ' + c.function.arguments }}</call>{% endfor %}"
) + _TAIL  # fmt: skip
# Key by key, as Qwen3-Coder writes it.
AS_XML = TOOLS + _HEAD + (
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call={{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}"
    "</call>{% endfor %}"
) + _TAIL  # fmt: skip
# Calls only where the content is null, as DeepSeek V3 has it; otherwise the content alone.
NULL_CONTENT = TOOLS + _HEAD + (
    "{% if m.content is none %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
) + _TAIL  # fmt: skip
# Calls only where there is no content at all.
NO_CONTENT = NULL_CONTENT.replace("m.content is none", "m.content is not defined")
# A null content is printed: "None".
PRINTS_NULL = TOOLS + _HEAD + (
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}"
) + _TAIL  # fmt: skip
# Roles and contents, nothing else.
CONTENT_ALONE = _HEAD + "{{ m.content }}" + _TAIL

CALL = {"type": "function", "function": {"name": "depth", "arguments": {"lake": "Onega"}}}


def calling(content=..., arguments=..., calls=1):
    """Messages with tool calls; content and arguments as given, or as CALL has them."""
    function = dict(CALL["function"])
    if arguments is not ...:
        function["arguments"] = arguments
    said = {"role": "assistant", "tool_calls": [{**CALL, "function": function}] * calls}
    if content is not ...:
        said["content"] = content
    return [
        {"role": "user", "content": "How deep?"},
        said,
        {"role": "tool", "content": "127"},
        {"role": "assistant", "content": "127 metres."},
    ]


def chatml(template, **options):
    """(tokenizer, encoder) of a template over ChatML's special tokens."""
    tokenizer = byte_level_tokenizer(template, CHATML_SPECIALS, eos="<|im_end|>")
    return tokenizer, ChatEncoder(encoder_spec(tokenizer, **options))


def texts(pair, row, flag=SUPERVISED):
    """For each sample of a row, the text of its flagged tokens; turns are joined."""
    tokenizer, encoder = pair
    return [
        tokenizer.decode((f & ID_MASK)[(f & flag) != 0], clean_up_tokenization_spaces=False)
        for f in encoder.encode(encoder.render(parse_row(row, None)))
    ]
