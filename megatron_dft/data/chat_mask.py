"""A conversation to token ids and an exact assistant-only mask.

Two ways to find the characters that train:

- `{% generation %}` marks, where the template has them: what they enclose, nothing else.
- Otherwise the prefix method. The conversation up to an assistant turn, rendered with the
  generation prompt, is exactly what the model sees before it answers; the turn ends with the
  template's end-of-turn token. Both must be prefixes of the whole text. Where they are not, the
  template rewrites earlier turns when later ones arrive (Qwen3 drops their reasoning), and each
  turn is rendered as a sample of its own: the one text that the model will meet at inference.

The mask is then read off the tokenizer's offsets: one tokenisation a conversation, and no guess
about where tokens merge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dft.data.schema import Conversation, RowError
from megatron_dft.data.template import ChatTemplate, Span, TemplateError

# Bit 31 of a stored token says that it is supervised; ids stay far below it.
SUPERVISED = np.uint32(1 << 31)
ID_MASK = np.uint32((1 << 31) - 1)

REWRITES = ("per-turn", "refuse")


@dataclass(frozen=True)
class EncoderSpec:
    """All that turns a conversation into ids: picklable, hashable, without transformers.

    tokenizer_json is the `tokenizers` library's own serialisation; templates maps "default" (and
    "tool_use") to Jinja source; variables are what the template may read besides the messages;
    date is ISO (YYYY-MM-DD) or None; rewrites is one of REWRITES.
    """

    tokenizer_json: str
    templates: Mapping[str, str]
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    rewrites: str = "per-turn"


@dataclass
class Rendered:
    """One training text: the characters [start, end) of each span are supervised."""

    text: str
    spans: list[Span]


class ChatEncoder:
    """Renders conversations and tokenises them, with the supervised tokens flagged.

    Raises ValueError from the constructor where the template cannot give a right mask at all.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        import datetime

        from tokenizers import Tokenizer

        layout = json.loads(spec.tokenizer_json)
        # Special tokens come from the template, so the post-processor has nothing to add; but a
        # byte-level one trims whitespace off the offsets, which would hide where a token starts.
        layout["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(layout))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = '"ByteLevel"' in json.dumps(
            [layout.get("pre_tokenizer"), layout.get("decoder")]
        )
        self._special = _longest_first(t["content"] for t in layout["added_tokens"] if t["special"])
        self.rewrites = spec.rewrites
        self.eos_token = spec.variables.get("eos_token")
        self.bos_token = spec.variables.get("bos_token") if spec.variables.get("add_bos") else None
        date = datetime.date.fromisoformat(spec.date) if spec.date else None
        self.template = ChatTemplate(spec.templates, spec.variables, date)
        self._end_of_turn = self._find_end_of_turn()
        if not self.template.has_marks:
            self._check_generation_prompt()

    # -- characters ---------------------------------------------------------------------------

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
                "of this turn, so no mask is right; give a template with {% generation %} marks"
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
        except RowError:
            raise ValueError(
                "the chat template's generation prompt does not begin its rendering of the answer "
                "(a stray character at its end, or a prompt that opens a <think> block), so no "
                "mask is right; mend it, or mark the answers with {% generation %}, and give it "
                "with --chat-template FILE"
            ) from None

    # -- tokens -------------------------------------------------------------------------------

    def encode(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """uint32 [n] for each text: token ids, SUPERVISED set on those that train.

        Tokens behind the last supervised one are cut: a causal model's loss cannot see them. A
        text whose spans hold no token at all gives an empty array.
        """
        encodings = self._tokenizer.encode_batch(
            [r.text for r in rendered], add_special_tokens=False
        )
        return [self._flag(e, r) for e, r in zip(encodings, rendered, strict=True)]

    def _flag(self, encoding: Any, rendered: Rendered) -> np.ndarray:
        straddled = [a for a, b in rendered.spans if self._straddles(encoding, a, b)]
        if straddled and self._byte_level:
            return self._flag_in_pieces(rendered, straddled)
        ids = np.array(encoding.ids, dtype=np.uint32)
        last = 0
        for start, end in rendered.spans:
            first = _token_from(encoding, start, end)
            if first is None:
                continue
            if encoding.token_to_chars(first)[0] < start:
                first += 1  # half of it belongs to the header, which must not train
            last = _token_behind(encoding, end, len(rendered.text), len(ids))
            ids[first:last] |= SUPERVISED
        return ids[:last]

    def _straddles(self, encoding: Any, start: int, end: int) -> bool:
        """Whether an ordinary token holds characters from both sides of a span's start."""
        first = _token_from(encoding, start, end)
        if first is None:
            return False
        begin, stop = encoding.token_to_chars(first)
        return begin < start and not self._special.fullmatch(encoding.tokens[first])

    def _flag_in_pieces(self, rendered: Rendered, cuts: Sequence[int]) -> np.ndarray:
        """Tokenises the text in pieces, so that none straddles a cut.

        This is what inference does: the prompt is tokenised alone and the answer's tokens follow.
        Exact for byte-level tokenizers, which add nothing at the start of a text.
        """
        borders = [0, *cuts, len(rendered.text)]
        pieces = []
        for begin, stop in zip(borders, borders[1:], strict=False):
            spans = [
                (max(a, begin) - begin, min(b, stop) - begin)
                for a, b in rendered.spans
                if a < stop and b > begin
            ]
            text = rendered.text[begin:stop]
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ids = np.array(encoding.ids, dtype=np.uint32)
            for start, end in spans:
                first = _token_from(encoding, start, end)
                if first is not None:
                    ids[first : _token_behind(encoding, end, len(text), len(ids))] |= SUPERVISED
            pieces.append(ids)
        ids = np.concatenate(pieces)
        supervised = np.flatnonzero(ids & SUPERVISED)
        return ids[: supervised[-1] + 1] if len(supervised) else ids[:0]


def _token_from(encoding: Any, start: int, end: int) -> int | None:
    """The first token that covers a character of [start, end)."""
    for char in range(start, end):
        token = encoding.char_to_token(char)
        if token is not None:
            return int(token)
    return None


def _token_behind(encoding: Any, end: int, length: int, count: int) -> int:
    """The index behind the last token that covers a character before `end`."""
    for char in range(end, length):
        token = encoding.char_to_token(char)
        if token is not None:
            return int(token) + (encoding.token_to_chars(token)[0] < end)
    return count


def _longest_first(tokens: Any) -> re.Pattern[str]:
    ordered = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")
