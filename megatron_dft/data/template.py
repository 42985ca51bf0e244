"""Renders chat templates as transformers does, without importing transformers.

The tokenising workers start by the dozen and must stay small, so the Jinja environment that chat
templates expect (sandbox, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`) is built
here; tests/data/test_chat_mask.py holds its output to transformers' own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_dft.data.bounds import TimeUp

Message = Mapping[str, Any]
Span = tuple[int, int]

_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
# transformers hands a message's reasoning to templates under these names, whichever the row used.
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """The template refused or failed on a conversation; the message is one line."""


class TemplateDateError(ValueError):
    """The template prints today's date and none is fixed: no conversation's fault."""


class _GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: brackets the block with two private-use characters.

    transformers counts the characters rendered so far instead, which is wrong inside a macro or a
    `{% set %}` block, whose text is rendered before it is placed. Marks that travel with the text
    cannot be misplaced.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with two short cuts for what chat templates do at every message.

    Both give what the sandbox gives: a loop's public attributes are safe, and a dict without a
    method of that name has only its item.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute in obj and not hasattr(dict, attribute):
                return obj[attribute]
        elif kind is LoopContext and attribute[0] != "_":
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


# Private-use characters of plane 16; a row that contains one is refused before it is rendered.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the text that the model sees.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """One tokenizer's chat template(s), compiled.

    Args:
        templates: name → Jinja source; "default" is required, "tool_use" serves rows with tools.
        variables: what the template may read besides the messages: special tokens (`bos_token`, …)
            and the user's own arguments.
        date: what `strftime_now` tells the template, a `datetime.date`; None makes a template that
            asks for today's date fail, because its text would change from one day to the next.
    """

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, Any], date: Any = None
    ) -> None:
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationMarks, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        self._date = date
        # Merged once: Jinja would merge globals and variables again at every rendering.
        self._names = {**environment.globals, "documents": None, **variables}
        try:
            self._compiled = {n: environment.from_string(s) for n, s in templates.items()}
        except (TimeUp, MemoryError):
            raise
        except (
            Exception
        ) as error:  # Python's own compiler has limits too: SyntaxError, RecursionError
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(
                f"the chat template is not valid Jinja: {line}{_one_line(error)}; "
                "mend it or give another with --chat-template FILE"
            ) from None
        self._sources = " ".join(templates.values())
        self.has_marks = all(_GENERATION_TAG.search(s) for s in templates.values())

    def mentions(self, name: str) -> bool:
        """Whether the template's source reads a key of this name from something."""
        escaped = re.escape(name)
        return bool(re.search(rf"""\.\s*{escaped}\b|['"]{escaped}['"]""", self._sources))

    def _strftime_now(self, pattern: str) -> str:
        if self._date is None:
            raise TemplateDateError(
                "the chat template prints today's date, so that the same data would give other "
                "tokens tomorrow; fix the date with --template-date YYYY-MM-DD, or give the "
                "template's own variable with --chat-template-args '{\"date_string\": ...}'"
            )
        return self._date.strftime(pattern)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, generation marks removed."""
        text = self._render(messages, tools, add_generation_prompt)
        return _MARK.sub("", text) if self.has_marks else text

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text and the [start, end) characters of each `{% generation %}` block, in order."""
        pieces, spans, starts, length = [], [], [], 0
        marked = self._render(messages, tools, False)
        position = 0
        for mark in _MARK.finditer(marked):
            pieces.append(marked[position : mark.start()])
            length += mark.start() - position
            position = mark.end()
            if mark.group() == _OPEN:
                starts.append(length)
            elif len(starts) == 1:
                spans.append((starts.pop(), length))
            else:
                starts.pop()
        pieces.append(marked[position:])
        return "".join(pieces), [span for span in spans if span[0] < span[1]]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        try:
            template = self._compiled[name]
            names = {
                **self._names,
                "messages": messages,
                "tools": tools or None,
                "add_generation_prompt": prompt,
            }
            # As template.new_context gives it, but for the names of the globals: only an import
            # reads them, which a template without a loader has none of, and they take as long to
            # list as a short message takes to render.
            context = Context(template.environment, names, template.name, template.blocks)
            return "".join(template.root_render_func(context))
        except (TemplateDateError, TimeUp, MemoryError):
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses it: {_one_line(error)}") from None
        except (
            Exception
        ) as error:  # a template is a program: whatever it meets in a row is possible
            raise TemplateError(
                f"the chat template fails on it: {type(error).__name__}: {_one_line(error)}"
            ) from None


def has_marks(text: str) -> bool:
    """Whether text holds one of the two characters that this module uses as marks."""
    return _MARK.search(text) is not None


def alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Gives the message's reasoning under the names that templates read."""
    for name in REASONING_NAMES:
        if message.get(name) is not None:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _one_line(error: BaseException) -> str:
    message = error.message if isinstance(error, jinja2.TemplateSyntaxError) else str(error)
    text = " ".join((message or type(error).__name__).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
