"""Where an assistant turn ends: the special token that the template writes behind it."""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_dft.data.conversation import Conversation, RowError
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.template import REASONING_NAMES, ChatTemplate, Span, TemplateError

_USER, _ANSWER = "Zqwuser", "Zqwanswer"


class TurnEnds:
    """The special tokens that a template puts behind assistant turns, found on a plain probe.

    A turn with another one behind it and the last turn may end differently (<|end|>, <|return|>),
    and behind the last one's end a trailer may stand that is no turn's (Phi 3's <|endoftext|>).

    Raises ValueError from the constructor where the model could not learn to stop.
    """

    def __init__(self, template: ChatTemplate, spec: EncoderSpec) -> None:
        self._special = _longest_first(special_tokens(spec))
        probe = [
            {"role": "user", "content": _USER + "1"},
            {"role": "assistant", "content": _ANSWER + "1"},
            {"role": "user", "content": _USER + "2"},
            {"role": "assistant", "content": _ANSWER + "2"},
        ]
        try:
            text = template.render(probe)
        except TemplateError as error:
            raise ValueError(
                f"the chat template cannot render a plain two-turn conversation: {error}; "
                "give another with --chat-template FILE"
            ) from None
        start, stop = text.find(_ANSWER + "1") + len(_ANSWER) + 1, text.find(_USER + "2")
        if text.find(_ANSWER + "1") < 0 or stop < start:
            raise ValueError(
                "the chat template does not print the messages in their order; give another with "
                "--chat-template FILE"
            )
        middle = self._special.search(text, start, stop)
        last = self._special.search(text, max(text.find(_ANSWER + "2"), stop))
        if middle is None or (template.has_marks and last is None):
            raise ValueError(
                "the chat template writes no special token behind an assistant turn, so the model "
                "would never learn to stop; add the end-of-turn token to the template and give it "
                "with --chat-template FILE"
            )
        found = [m.group() for m in (last, middle) if m is not None]
        self._usual = tuple(dict.fromkeys(found))
        self._trailer = "" if last is None else text[last.end() :]
        if template.has_marks:
            _check_marks(template.render_marked(probe)[1], [middle, last])

    def behind(self, text: str, start: int, turn: int) -> Span:
        """The end token of the turn that begins at `start` and is the last of `text`.

        Raises RowError where the template writes none.
        """
        for token in self._usual:
            at = text.rfind(token, start)
            if at >= 0 and not self._goes_on(text, at + len(token)):
                return at, at + len(token)
        # A tool call may end otherwise (Llama 3.1: <|eom_id|>): then what follows its last text.
        found: re.Match[str] | None = None
        position = start
        for match in self._special.finditer(text, start):
            if found is None or text[position : match.start()].strip():
                found = match
            position = match.end()
        if found is None or text[position:].strip():
            raise RowError(f"message {turn}: the template writes no end-of-turn token behind it")
        return found.span()

    def notes(self, conversation: Conversation) -> list[str]:
        """What is to be said of messages that hold such a token in their own text.

        The tokenizer takes it for what it says: generation stops in the middle of such an answer.
        """
        found: list[str] = []
        for index, message in enumerate(conversation.messages[: conversation.trained[-1] + 1]):
            text = message.get("content") or ""
            if len(message) > 2:
                text = "\n".join([text, *(message.get(name, "") for name in REASONING_NAMES)])
            for token in self._usual:
                if token not in text:
                    continue
                note = f"prompts hold {token} in their text: it reads as the end of a turn"
                if index in conversation.trained:
                    note = f"answers hold {token} in their text: generation will stop there"
                if note not in found:
                    found.append(note)
        return found

    def inside(self, text: str, start: int, stop: int) -> Span:
        """The end token in a span that the template marked; empty at its end where it has none."""
        end = len(text[start:stop].rstrip()) + start
        for token in self._usual:
            if text.endswith(token, start, end):
                return end - len(token), end
        for match in self._special.finditer(text, start, end):
            if match.end() == end:
                return match.span()
        return stop, stop

    def _goes_on(self, text: str, at: int) -> bool:
        """Whether the turn's own text follows: more than special tokens, space and the trailer."""
        if at == len(text) or text[at:] == self._trailer:
            return False
        return bool(self._special.sub("", text[at:]).strip())


def _check_marks(spans: list[Span], ends: list[Any]) -> None:
    for end in ends:
        if not any(a <= end.start() and end.end() <= b for a, b in spans):
            raise ValueError(
                f"the chat template's generation marks leave out {end.group()!r} behind an "
                "assistant turn, so the model would never learn to stop; move "
                "{% endgeneration %} behind it"
            )


def _longest_first(tokens: Any) -> re.Pattern[str]:
    ordered = sorted({t for t in tokens if t}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def special_tokens(spec: EncoderSpec) -> list[str]:
    """The tokenizer's special tokens; added tokens that are not special (<think>) are no ends."""
    return [t["content"] for t in json.loads(spec.tokenizer_json)["added_tokens"] if t["special"]]
