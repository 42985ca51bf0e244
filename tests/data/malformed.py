"""Strategies of malformed rows in every layout, and of malformed chat templates."""

from hypothesis import strategies as st

from tests.data.families import FAMILIES
from tests.data.fixtures import CHATML_TEMPLATE
from tests.data.test_turn_end import CHANNELS
from tests.data.tool_templates import AS_JSON, AS_XML, NULL_CONTENT, PASTED, PRINTS_NULL

_ODD_TEXT = st.sampled_from(
    ["", " ", "\n", "a", "b c", "<|im_end|>", "<|im_start|>assistant\n", "<think>", "\0", "\ud800",
     "\U0010fff0", "é🙂", "null", "None", "{}", "{", "[]", '{"name": "f", "arguments": {}}',
     '[{"name": "f"}]', "Zq0cz", "1e999", "{{ m }}", "x" * 3000, "a\u2028b", "</s>", "-", "﷽"]
)  # fmt: skip
_NUMBERS = st.sampled_from([0, 1, -1, 0.0, 0.5, 2, 1e39, -1e-9, 1e-60, 10**400, float("nan"),
                            float("inf"), True, False])  # fmt: skip
_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "messages", "tool_calls", "function_call", "function",
     "name", "arguments", "weight", "train", "loss", "loss_mask", "training", "train_detail", "id",
     "reasoning_content", "thinking", "tools", "functions", "system", "type", "text", "", "\ud800"]
)  # fmt: skip
_LEAVES = st.one_of(st.none(), _NUMBERS, _ODD_TEXT, st.text(max_size=5))
ANYTHING = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)
_ROLES = st.sampled_from(
    ["system", "developer", "user", "assistant", "tool", "function", "human", "gpt",
     "function_call", "observation", "bot", None, 3]
)  # fmt: skip
_CALL = st.fixed_dictionaries(
    {},
    optional={
        "id": _ODD_TEXT,
        "type": st.just("function"),
        "name": _ODD_TEXT,
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "g", ""])}, optional={"arguments": ANYTHING}
        ),
    },
)
_EXTRAS = {
    "tool_calls": st.lists(_CALL, max_size=3) | ANYTHING,
    "function_call": _CALL | ANYTHING,
    "reasoning_content": _LEAVES,
    "thinking": _LEAVES,
    "name": _LEAVES,
    "weight": _NUMBERS | _LEAVES,
    "train": _NUMBERS | _LEAVES,
    "loss": _NUMBERS,
    "loss_mask": ANYTHING,
    "mood": ANYTHING,
}
_CONTENT = _ODD_TEXT | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": _LEAVES}), max_size=2
) | ANYTHING  # fmt: skip
_MESSAGE = st.fixed_dictionaries({"role": _ROLES}, optional={"content": _CONTENT, **_EXTRAS})
_TURN = st.fixed_dictionaries({"from": _ROLES}, optional={"value": _CONTENT, **_EXTRAS})


def _alternating(role, text, **optional):
    """Turns in an order that most templates take, so that what they say is what is wrong."""

    def turns(contents):
        names = ("user", "assistant") if role == "role" else ("human", "gpt")
        return [{role: names[i % 2], text: c, **more} for i, (c, more) in enumerate(contents)]

    extras = st.fixed_dictionaries({}, optional=_EXTRAS)
    said = st.tuples(_ODD_TEXT | st.none(), extras)
    return st.lists(said, min_size=2, max_size=6).map(turns)


def _calls(name):
    function = st.fixed_dictionaries({"name": name}, optional={"arguments": ANYTHING})
    return st.lists(st.fixed_dictionaries({"function": function}), min_size=1, max_size=3)


_WORDS = st.sampled_from(["a", "b c", "x<|im_end|>y", "<think>t</think>u", "None", "é🙂", "{}"])
_ASKED = {
    "tool_calls": _calls(st.sampled_from(["f", "é", "<|im_end|>"])),
    "reasoning_content": _WORDS | st.just(""),
    "weight": st.sampled_from([0, 0.5, 1, 3]),
    "train": st.booleans(),
    "mood": ANYTHING,
}


@st.composite
def plausible(draw):
    """A row that is right but for what its calls, tools and contents hold: it gets to the end."""
    answer = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": _WORDS | st.none()}, optional=_ASKED
    )
    messages = [{"role": draw(st.sampled_from(["system", "developer"])), "content": draw(_WORDS)}]
    messages = messages[: draw(st.integers(0, 1))]
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(_WORDS)}, draw(answer)]
        for _ in range(draw(st.integers(0, 2))):
            messages.append({"role": "tool", "content": draw(_WORDS | st.just(""))})
        if messages[-1]["role"] == "tool":
            messages.append(draw(answer))
    tools = st.lists(st.fixed_dictionaries({"function": ANYTHING}), max_size=2)
    return draw(st.fixed_dictionaries({"messages": st.just(messages)}, optional={"tools": tools}))


_TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": ANYTHING}), max_size=2
) | ANYTHING  # fmt: skip
_COLUMNS = {"tools": _TOOLS, "functions": _TOOLS, "system": _LEAVES, "weight": _NUMBERS | _LEAVES,
            "id": ANYTHING}  # fmt: skip
_MESSAGES = st.lists(_MESSAGE, max_size=5) | _alternating("role", "content") | ANYTHING
ROWS = {
    "messages": st.fixed_dictionaries({"messages": _MESSAGES}, optional=_COLUMNS),
    "sharegpt": st.fixed_dictionaries(
        {"conversations": st.lists(_TURN, max_size=5) | _alternating("from", "value")},
        optional=_COLUMNS,
    ),
    "alpaca": st.fixed_dictionaries(
        {"instruction": _LEAVES, "output": _LEAVES},
        optional={"input": ANYTHING, "history": ANYTHING, **_COLUMNS},
    ),
    "prompt-completion": st.fixed_dictionaries(
        {"prompt": _MESSAGES | _ODD_TEXT, "completion": _MESSAGES | _ODD_TEXT}, optional=_COLUMNS
    ),
    "plausible": plausible(),
    "anything": ANYTHING,
}

WHOLE_TEMPLATES = [
    *(CHATML_TEMPLATE, AS_JSON, AS_XML, NULL_CONTENT, PASTED, PRINTS_NULL, CHANNELS),
    *(f.template for f in FAMILIES.values()),
]
_PIECES = st.sampled_from(
    ["{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ 1/0 }}",
     "<|im_end|>", "<|im_start|>", "{% if add_generation_prompt %}", "{% endif %}", "{%", "}}",
     "{{", "{{ m.content.foo.bar }}", "{% generation %}", "{% endgeneration %}", "\n", " ",
     "{% set x = x ~ 'a' %}", "{{ raise_exception('no') }}", "{{ '\\ud800' }}", "{{ f() }}",
     "{{ messages[99].x }}", "{% macro f() %}", "{% endmacro %}", "{{ strftime_now('%Y') }}",
     "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{% import 'os' as o %}", "{{ self }}",
     "{{ messages | tojson }}", "{{ tools[0] }}", "{{ '%d' % 'a' }}", "{{ [1] + 'a' }}",
     "{{ 'a'.index('b') }}", "{{ range(99999999) | list }}", "{{ cycler }}", "{% break %}",
     "{{ namespace(a=1).b.c }}", "{{ messages.append(1) }}", "{{ m.update({'a': 1}) }}"]
)  # fmt: skip


@st.composite
def cut_templates(draw):
    """A real template with a part cut out, doubled, or put in place of by a piece."""
    text = draw(st.sampled_from(WHOLE_TEMPLATES))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 40)))
        text = (
            text[:begin] + draw(_PIECES | st.just("") | st.just(text[begin:end] * 2)) + text[end:]
        )
    return text


TEMPLATES = st.lists(_PIECES, max_size=12).map("".join) | cut_templates()
