"""A conversation to text and the exact characters of it that train.

Two ways to find the characters that train:

- `{% generation %}` marks, where the template has them: what they enclose, nothing else.
- Otherwise the prefix method. The conversation up to an assistant turn, rendered with the
  generation prompt, is exactly what the model sees before it answers; the turn ends with the
  template's end-of-turn token. Both must be prefixes of the whole text. Where they are not, the
  template rewrites earlier turns when later ones arrive (Qwen3 drops their reasoning), and each
  turn is rendered as a sample of its own: the one text that the model will meet at inference.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dft.data.bounds import MEMORY, Bounded, TimeUp
from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.dialect import Dialect
from megatron_dft.data.row_values import shown
from megatron_dft.data.sentinels import Drops
from megatron_dft.data.spec import END, WRITTEN, EncoderSpec
from megatron_dft.data.template import ChatTemplate, Span, TemplateError
from megatron_dft.data.turn_end import TurnEnds
from megatron_dft.data.written import left_out, written

# [start, end) and the flags of its tokens: spec.WRITTEN, or spec.END and WRITTEN.
Kind = tuple[int, int, int]
_WRITTEN, _END = int(WRITTEN), int(END | WRITTEN)
_REMEDY = "give one that does with --chat-template FILE, or take it out of the row"


@dataclass
class Rendered:
    """One training text: the characters [start, end) of each span are supervised.

    weights: the factor on each span's loss, None where all are 1; kinds: parts of the spans with
    the flag of their tokens, spec.END or spec.WRITTEN or both.
    """

    text: str
    spans: list[Span]
    weights: list[float] | None = None
    kinds: list[Kind] = field(default_factory=list)


class TurnRenderer:
    """Renders conversations and finds the characters that train.

    Raises ValueError from the constructor where the template cannot give a right mask at all.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self.rewrites, self.drops = spec.rewrites, spec.drops
        self.eos_token = spec.variables.get("eos_token")
        self.bos_token = spec.variables.get("bos_token") if spec.variables.get("add_bos") else None
        date = datetime.date.fromisoformat(spec.date) if spec.date else None
        self._lost = Drops()
        self._bounded = Bounded()
        try:
            with self._bounded:
                self.template = ChatTemplate(spec.templates, spec.variables, date)
                self._ends = TurnEnds(self.template, spec)
                self._dialect = Dialect(self.template)
                if not self.template.has_marks:
                    self._check_generation_prompt()
        except (TimeUp, MemoryError) as error:
            raise ValueError(
                f"the chat template is given up on a plain conversation: {_limit(error)}; give "
                "another with --chat-template FILE"
            ) from None

    def batch(self) -> contextlib.AbstractContextManager[None]:
        """For many calls of `render`: bounds.Bounded.batch."""
        return self._bounded.batch()

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The texts to train on: one, or one for each turn where the template rewrites turns.

        Raises RowError where the template refuses the conversation, where it takes more time or
        memory than bounds.py gives, and where it prints a part of it nowhere (with drops "warn"
        that is a note of the conversation).
        """
        if conversation.text is not None:
            return [self._render_verbatim(conversation)]
        try:
            with self._bounded:
                return self._render(conversation)
        except (TimeUp, MemoryError) as error:
            raise RowError(f"the chat template is given up on it: {_limit(error)}") from None

    def _render(self, conversation: Conversation) -> list[Rendered]:
        try:
            if conversation.calls:
                conversation = self._dialect.adapt(conversation)
            if self.template.has_marks:
                rendered = [self._render_by_marks(conversation)]
            else:
                rendered = self._render_by_prefixes(conversation)
        except TemplateError as error:
            raise RowError(str(error)) from None
        self._check_drops(conversation, len(rendered) > 1)
        conversation.notes += self._ends.notes(conversation)
        for one in rendered:
            _check_encodable(one.text)
        return rendered

    def _render_verbatim(self, conversation: Conversation) -> Rendered:
        assert conversation.text is not None
        prompt, completion = conversation.text
        prompt, eos = (self.bos_token or "") + prompt, self.eos_token or ""
        text = prompt + completion + eos
        end = (len(text) - len(eos), len(text))
        kinds = [(*end, _END)] if eos else []
        return Rendered(text, [(len(prompt), len(text))], _weights(conversation, [0]), kinds)

    def _render_by_marks(self, conversation: Conversation) -> Rendered:
        last = conversation.trained[-1]
        messages = conversation.messages[: last + 1]
        text, spans = self.template.render_marked(messages, conversation.tools)
        turns = [i for i in conversation.assistant_turns() if i <= last]
        if len(spans) == len(turns):
            spans = [s for s, t in zip(spans, turns, strict=True) if t in conversation.trained]
            turns = conversation.trained
            weights = _weights(conversation, turns)
            kinds = []
            for number, (span, turn) in enumerate(zip(spans, turns, strict=True)):
                end = self._ends.inside(text, *span)
                begin = spans[number - 1][1] if number else 0
                kinds += self._kinds(conversation, turn, text, span, end, begin)
        else:
            weights, kinds = self._unpaired(conversation, text, spans, turns)
        if not spans:
            raise RowError("the template marks no generation in it")
        return Rendered(text, spans, weights, kinds)

    def _unpaired(
        self, conversation: Conversation, text: str, spans: list[Span], turns: list[int]
    ) -> tuple[list[float] | None, list[Kind]]:
        """Weights and kinds of marks of which nobody knows which turn they belong to."""
        given = {conversation.weights.get(t, 1.0) for t in conversation.trained}
        if len(conversation.trained) < len(turns) or len(given) > 1:
            raise RowError(
                f"the template marks {len(spans)} generations for {len(turns)} assistant "
                "turns, so a turn with train: false or a weight of its own cannot be told from "
                "the others"
            )
        for turn in conversation.trained:
            self._check_content(conversation, turn, text, (0, len(text)), bool(spans))
        weights = [next(iter(given))] * len(spans)
        ends = [self._ends.inside(text, *span) for span in spans]
        return (
            weights if given != {1.0} else None,
            [(a, b, _END) for a, b in ends if a < b],
        )

    def _render_by_prefixes(self, conversation: Conversation) -> list[Rendered]:
        messages, tools = conversation.messages, conversation.tools
        last = conversation.trained[-1]
        # What follows the last trained turn cannot change any loss: it is not even rendered.
        text = self.template.render(messages[: last + 1], tools)
        spans: list[Span] = []
        kinds: list[Kind] = []
        for turn in conversation.trained:
            own = text if turn == last else self.template.render(messages[: turn + 1], tools)
            start, end = self._turn(own, messages, tools, turn)
            if own is not text and not text.startswith(own[: end[1]]):
                return self._render_per_turn(conversation)
            spans.append((start, end[1]))
            kinds += self._kinds(conversation, turn, own, spans[-1], end, start)
        return [Rendered(text, spans, _weights(conversation, conversation.trained), kinds)]

    def _render_per_turn(self, conversation: Conversation) -> list[Rendered]:
        if self.rewrites == "refuse":
            raise RowError(
                "the chat template rewrites an earlier turn when a later one follows; render each "
                "turn as its own sample with --chat-rewrites per-turn"
            )
        rendered = []
        messages = conversation.messages
        for turn in conversation.trained:
            text = self.template.render(messages[: turn + 1], conversation.tools)
            start, end = self._turn(text, messages, conversation.tools, turn)
            span = (start, end[1])
            kinds = self._kinds(conversation, turn, text, span, end, start)
            rendered.append(Rendered(text, [span], _weights(conversation, [turn]), kinds))
        return rendered

    def _turn(
        self, own: str, messages: Sequence[Any], tools: Sequence[Any] | None, turn: int
    ) -> tuple[int, Span]:
        """Where `turn` begins in `own`, the conversation up to and with it, and its end token."""
        head = self.template.render(messages[:turn], tools, add_generation_prompt=True)
        if not own.startswith(head):
            raise RowError(
                f"message {turn}: the template's generation prompt does not begin its rendering "
                "of this turn (it opens a <think> block, or a stray character ends the template), "
                "so no mask is right; mark the answers with {% generation %}"
            )
        return len(head), self._ends.behind(own, len(head), turn)

    def _kinds(
        self,
        conversation: Conversation,
        turn: int,
        text: str,
        span: Span,
        end: Span,
        begin: int,
    ) -> list[Kind]:
        """Kinds of a trained turn's parts; text[begin:] is what was printed of it.

        Raises RowError where a part of its content is not.
        """
        message = conversation.messages[turn]
        found = written(text, span[0], end[0], message)
        if found is None:
            answered = bool(text[span[0] : end[0]].strip())
            self._check_content(conversation, turn, text, (begin, span[1]), answered)
        kinds = [(a, b, _WRITTEN) for a, b in found] if found else []
        if end[0] < end[1]:
            kinds.append((*end, _END))
        if end[1] < span[1]:
            kinds.append((end[1], span[1], _WRITTEN))
        return kinds

    def _check_content(
        self, conversation: Conversation, turn: int, text: str, printed: Span, answered: bool
    ) -> None:
        """What a template cuts out of one content and prints of others, so that no sentinel says
        it: DeepSeek's leaves out all before a </think>."""
        content = conversation.messages[turn].get("content") or ""
        lost = left_out(text, *printed, content)
        if lost is None:
            return
        if self.drops == "refuse" or not answered:
            remedy = f"{_REMEDY}, or train without it with --chat-drops warn"
            raise RowError(
                f"the chat template leaves {shown(lost)} of message {turn}'s content out; "
                f"{remedy if answered else _REMEDY}"
            )
        note = "the chat template leaves a part of an answer's content out"
        if note not in conversation.notes:
            conversation.notes.append(note)

    def _check_drops(self, conversation: Conversation, per_turn: bool) -> None:
        def render(messages: Sequence[Any], tools: Sequence[Any] | None) -> str:
            ends = conversation.trained if per_turn else [len(messages) - 1]
            return "".join(self.template.render(messages[: e + 1], tools) for e in ends)

        lost = self._lost.of(conversation, render)
        if not lost.parts and not lost.empty:
            return
        what = ", ".join(lost.parts[:4]) or f"anything of message {lost.empty[0]}"
        remedy = _REMEDY
        if lost.empty or self.drops == "refuse":
            if not lost.empty:
                remedy += ", or train without it with --chat-drops warn"
            raise RowError(f"the chat template does not print {what}; {remedy}")
        kinds = dict.fromkeys(part.split(" (message")[0] for part in lost.parts)
        conversation.notes += [f"the chat template does not print {kind}" for kind in kinds]

    def _check_generation_prompt(self) -> None:
        """A template that no row could pass is the template's fault, not the first row's."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            self._turn(self.template.render(probe), probe, None, 1)
        except (RowError, TemplateError) as error:
            raise ValueError(
                f"the chat template cannot be masked, on a plain conversation: {error}; give "
                "another with --chat-template FILE"
            ) from None


def _limit(error: BaseException) -> str:
    return str(error) if isinstance(error, TimeUp) else f"it takes more than {MEMORY >> 30} GiB"


def _check_encodable(text: str) -> None:
    """The row's texts were checked; a template's own literals may hold anything."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("the chat template writes a lone surrogate, which is no text") from None


def _weights(conversation: Conversation, turns: Sequence[int]) -> list[float] | None:
    weights = conversation.weights
    return [weights.get(turn, 1.0) for turn in turns] if weights else None
