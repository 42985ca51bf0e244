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

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dft.data.schema import Conversation, RowError
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.template import ChatTemplate, Span, TemplateError


@dataclass
class Rendered:
    """One training text: the characters [start, end) of each span are supervised."""

    text: str
    spans: list[Span]


class TurnRenderer:
    """Renders conversations and finds the characters that train.

    Raises ValueError from the constructor where the template cannot give a right mask at all.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._special = _longest_first(special_tokens(spec))
        self.rewrites = spec.rewrites
        self.eos_token = spec.variables.get("eos_token")
        self.bos_token = spec.variables.get("bos_token") if spec.variables.get("add_bos") else None
        date = datetime.date.fromisoformat(spec.date) if spec.date else None
        self.template = ChatTemplate(spec.templates, spec.variables, date)
        self._end_of_turn = self._find_end_of_turn()
        if not self.template.has_marks:
            self._check_generation_prompt()

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The texts to train on: one, or one for each turn where the template rewrites turns.

        Raises RowError where the template refuses the conversation.
        """
        try:
            if conversation.text is not None:
                return [self._render_verbatim(conversation.text)]
            if self.template.has_marks:
                return [self._render_by_marks(conversation)]
            return self._render_by_prefixes(conversation)
        except TemplateError as error:
            raise RowError(str(error)) from None

    def _render_verbatim(self, text: tuple[str, str]) -> Rendered:
        prompt, completion = (self.bos_token or "") + text[0], text[1] + (self.eos_token or "")
        return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])

    def _render_by_marks(self, conversation: Conversation) -> Rendered:
        text, spans = self.template.render_marked(conversation.messages, conversation.tools)
        turns = conversation.assistant_turns()
        if len(conversation.trained) < len(turns):
            if len(spans) != len(turns):
                raise RowError(
                    f"the template marks {len(spans)} generations for {len(turns)} assistant "
                    "turns, so a turn with train: false cannot be told from the others"
                )
            trained = set(conversation.trained)
            spans = [s for s, turn in zip(spans, turns, strict=True) if turn in trained]
        if not spans:
            raise RowError("the template marks no generation in it")
        return Rendered(text, spans)

    def _render_by_prefixes(self, conversation: Conversation) -> list[Rendered]:
        messages, tools = conversation.messages, conversation.tools
        last = conversation.trained[-1]
        # What follows the last trained turn cannot change any loss: it is not even rendered.
        text = self.template.render(messages[: last + 1], tools)
        spans: list[Span] = []
        for turn in conversation.trained:
            own = text if turn == last else self.template.render(messages[: turn + 1], tools)
            span = self._turn_span(own, messages, tools, turn)
            if text[: span[1]] != own[: span[1]]:
                return self._render_per_turn(conversation)
            spans.append(span)
        return [Rendered(text, spans)]

    def _render_per_turn(self, conversation: Conversation) -> list[Rendered]:
        if self.rewrites == "refuse":
            raise RowError(
                "the chat template rewrites an earlier turn when a later one follows; render each "
                "turn as its own sample with --chat-rewrites per-turn"
            )
        rendered = []
        for turn in conversation.trained:
            text = self.template.render(conversation.messages[: turn + 1], conversation.tools)
            span = self._turn_span(text, conversation.messages, conversation.tools, turn)
            rendered.append(Rendered(text, [span]))
        return rendered

    def _turn_span(
        self, own: str, messages: Sequence[Any], tools: Sequence[Any] | None, turn: int
    ) -> Span:
        """Where `turn` lies in `own`, the conversation rendered up to and with it."""
        head = self.template.render(messages[:turn], tools, add_generation_prompt=True)
        if not own.startswith(head):
            raise RowError(
                f"message {turn}: the template's generation prompt does not begin its rendering "
                "of this turn (it opens a <think> block, or a stray character ends the template), "
                "so no mask is right; mark the answers with {% generation %}"
            )
        end = own.rfind(self._end_of_turn, len(head))
        if end >= 0:
            return len(head), end + len(self._end_of_turn)
        # A tool call may end otherwise (Llama 3.1: <|eom_id|>): then the last special token.
        ends = [m.end() for m in self._special.finditer(own, len(head))]
        if not ends:
            raise RowError(f"message {turn}: the template writes no end-of-turn token behind it")
        return len(head), ends[-1]

    def _find_end_of_turn(self) -> str:
        """The special token that the template puts behind an assistant turn."""
        user, answer = "Zqwuser", "Zqwanswer"
        probe = [
            {"role": "user", "content": user + "1"},
            {"role": "assistant", "content": answer + "1"},
            {"role": "user", "content": user + "2"},
            {"role": "assistant", "content": answer + "2"},
        ]
        try:
            text = self.template.render(probe)
        except TemplateError as error:
            raise ValueError(
                f"the chat template cannot render a plain two-turn conversation: {error}; "
                "give another with --chat-template FILE"
            ) from None
        start, stop = text.find(answer + "1") + len(answer) + 1, text.find(user + "2")
        if text.find(answer + "1") < 0 or stop < start:
            raise ValueError(
                "the chat template does not print the messages in their order; give another with "
                "--chat-template FILE"
            )
        found = self._special.search(text, start, stop)
        if found is None:
            raise ValueError(
                "the chat template writes no special token behind an assistant turn, so the model "
                "would never learn to stop; add the end-of-turn token to the template and give it "
                "with --chat-template FILE"
            )
        if self.template.has_marks:
            _, spans = self.template.render_marked(probe)
            if not any(a <= found.start() and found.end() <= b for a, b in spans):
                raise ValueError(
                    f"the chat template's generation marks leave out {found.group()!r} behind an "
                    "assistant turn, so the model would never learn to stop; move "
                    "{% endgeneration %} behind it"
                )
        return found.group()

    def _check_generation_prompt(self) -> None:
        """A template that no row could pass is the template's fault, not the first row's."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            self._turn_span(self.template.render(probe), probe, None, 1)
        except RowError as error:
            raise ValueError(
                f"the chat template cannot be masked, on a plain conversation: {error}; give "
                "another with --chat-template FILE"
            ) from None


def _longest_first(tokens: Any) -> re.Pattern[str]:
    ordered = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def special_tokens(spec: EncoderSpec) -> list[str]:
    """The tokenizer's special tokens; added tokens that are not special (<think>) are no ends."""
    return [t["content"] for t in json.loads(spec.tokenizer_json)["added_tokens"] if t["special"]]
