"""Chat templates in the manner of the published families, each with the same layout in Python.

`pieces(messages)` writes the conversation by hand, as pieces of text with whether they train; it
shares nothing with the template or with the code under test. Where `rewrites`, a conversation
becomes one sample for each assistant turn, and pieces is asked for each of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.data.fixtures import CHATML_SPECIALS, byte_level_tokenizer

Pieces = list[tuple[str, bool]]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    specials: tuple[str, ...]
    eos: str
    pieces: Callable[[Messages], Pieces]
    bos: str | None = None
    plain: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    rewrites: bool = False

    def tokenizer(self) -> Any:
        return byte_level_tokenizer(self.template, self.specials, self.eos, self.bos, self.plain)


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [c["function"] for c in message.get("tool_calls", [])]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- Llama 3: headers, trimmed contents, tool calls that end with another token -------------------

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|python_tag|>' + {'name': call.name, 'parameters': call.arguments} | tojson }}
        {{- '<|eom_id|>' }}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def _llama3(messages: Messages) -> Pieces:
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for m in messages:
        role = {"tool": "ipython"}.get(m["role"], m["role"])
        body = m["content"].strip() + "<|eot_id|>"
        if calls := _calls(m):
            call = {"name": calls[0]["name"], "parameters": calls[0]["arguments"]}
            body = "<|python_tag|>" + _dump(call) + "<|eom_id|>"
        pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        pieces.append((body, role == "assistant"))
    return pieces


# -- ChatML: SmolLM2, Qwen2.5 (tools, answers of tools grouped in a user turn), Qwen3 -------------

SMOLLM2_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe a small helper<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def _smollm2(messages: Messages) -> Pieces:
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        pieces.append(("<|im_start|>system\nBe a small helper<|im_end|>\n", False))
    for m in messages:
        trains = m["role"] == "assistant"
        pieces.append((f"<|im_start|>{m['role']}\n", False))
        pieces.append((m["content"] + "<|im_end|>", trains))
        pieces.append(("\n", False))
    return pieces


_QWEN_HEAD = """\
{%- macro call_text(calls) %}
    {%- for call in calls %}
        {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content %}
{%- else %}{%- set first = 'You are helpful.' %}{%- endif %}
{{- '<|im_start|>system\\n' + first }}
{%- if tools %}{{- '\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
"""
_QWEN_TOOL = """\
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""
QWEN25_TEMPLATE = (
    _QWEN_HEAD
    + """\
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content + call_text(message.tool_calls or []) }}
        {{- '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
# Reasoning stays only behind the last question; the last answer always shows a reasoning block.
QWEN3_TEMPLATE = (
    _QWEN_HEAD
    + """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}
{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content + call_text(message.tool_calls or []) + '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)


def _qwen(messages: Messages, thinks: bool) -> Pieces:
    system = messages[0]["content"] if messages[0]["role"] == "system" else "You are helpful."
    pieces: Pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        follows = messages[i + 1]["role"] if i + 1 < len(messages) else ""
        if m["role"] == "user":
            pieces.append((f"<|im_start|>user\n{m['content']}<|im_end|>\n", False))
        elif m["role"] == "tool":
            text = "" if messages[i - 1]["role"] == "tool" else "<|im_start|>user"
            text += f"\n<tool_response>\n{m['content']}\n</tool_response>"
            pieces.append((text + ("" if follows == "tool" else "<|im_end|>\n"), False))
        elif m["role"] == "assistant":
            calls = "".join(f"\n<tool_call>\n{_dump(c)}\n</tool_call>" for c in _calls(m))
            thought = m.get("reasoning_content", "")
            shows = thinks and i > last and (i == len(messages) - 1 or thought)
            lead = f"<think>\n{thought}\n</think>\n\n" if shows else ""
            # Where a template rewrites, each sample trains its last turn alone.
            trains = not thinks or i == len(messages) - 1
            pieces.append(("<|im_start|>assistant\n", False))
            pieces.append((lead + m["content"] + calls + "<|im_end|>", trains))
            pieces.append(("\n", False))
    return pieces


# -- Mistral: no header before an answer, the system prompt inside the last question --------------

MISTRAL_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}
"""


def _mistral(messages: Messages) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            pieces.append((f"[INST] {system}{m['content']}[/INST]", False))
            system = ""
        else:
            pieces.append((f" {m['content']}</s>", True))
    return pieces


# -- Gemma: another name for the assistant, no system role, trimmed contents ----------------------

GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- raise_exception('System role not supported') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""


def _gemma(messages: Messages) -> Pieces:
    pieces: Pieces = [("<bos>", False)]
    for m in messages:
        role = {"assistant": "model"}.get(m["role"], m["role"])
        pieces.append((f"<start_of_turn>{role}\n", False))
        pieces.append((m["content"].strip() + "<end_of_turn>", role == "model"))
        pieces.append(("\n", False))
    return pieces


# -- Phi 3: an eos behind the whole conversation, which no turn owns ------------------------------

PHI3_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""


def _phi3(messages: Messages) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces.append((f"<|{m['role']}|>\n", False))
        pieces.append((m["content"] + "<|end|>", m["role"] == "assistant"))
        pieces.append(("\n", False))
    return [*pieces, ("<|endoftext|>", False)]


_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
FAMILIES = {
    f.name: f
    for f in (
        Family(
            "llama3",
            LLAMA3_TEMPLATE,
            ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
            "<|eot_id|>",
            _llama3,
            bos="<|begin_of_text|>",
            tools=True,
        ),
        Family("smollm2", SMOLLM2_TEMPLATE, CHATML_SPECIALS, "<|im_end|>", _smollm2),
        Family(
            "qwen2.5", QWEN25_TEMPLATE, CHATML_SPECIALS, "<|im_end|>", lambda m: _qwen(m, False),
            plain=_THINK, tools=True,
        ),
        Family(
            "qwen3", QWEN3_TEMPLATE, CHATML_SPECIALS, "<|im_end|>", lambda m: _qwen(m, True),
            plain=_THINK, tools=True, rewrites=True,
        ),
        Family("mistral", MISTRAL_TEMPLATE, ("<s>", "</s>"), "</s>", _mistral, bos="<s>"),
        Family(
            "gemma", GEMMA_TEMPLATE, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
            "<eos>", _gemma, bos="<bos>", system=False,
        ),
        Family(
            "phi3", PHI3_TEMPLATE,
            ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            "<|endoftext|>", _phi3,
        ),
    )
}  # fmt: skip
