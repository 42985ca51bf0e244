"""Text and characters that train to token ids with the supervised ones flagged.

The mask is read off the tokenizer's offsets: one tokenisation a conversation, and no guess about
where tokens merge.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_dft.data.chat_mask import Rendered, TurnRenderer
from megatron_dft.data.conversation import Conversation
from megatron_dft.data.spec import END, ID_MASK, SUPERVISED, EncoderSpec
from megatron_dft.data.tokenizer_growth import check_growth

_END = int(END)


class Encoded(NamedTuple):
    """One text's tokens.

    flagged: uint32 [n], the bits of spec; weights: float32 [n], the factor on the loss of each
    supervised token where it is not 1, 0 everywhere else; None where all are 1.
    """

    flagged: np.ndarray
    weights: np.ndarray | None


class ChatEncoder:
    """Renders conversations (chat_mask.TurnRenderer) and tokenises them.

    Raises ValueError from the constructor where the template cannot give a right mask at all.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        from tokenizers import Tokenizer

        layout = json.loads(spec.tokenizer_json)
        check_growth(layout)
        self._tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest > int(ID_MASK):
            raise ValueError(f"the tokenizer has the id {largest}; {int(ID_MASK)} is the largest")
        parts = json.dumps([layout.get("pre_tokenizer"), layout.get("decoder")])
        self._byte_level = '"ByteLevel"' in parts
        self.renderer = TurnRenderer(spec)

    def render(self, conversation: Conversation) -> list[Rendered]:
        """As TurnRenderer.render."""
        return self.renderer.render(conversation)

    def encode(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """uint32 [n] for each text: `flagged` of encode_weighted."""
        return [e.flagged for e in self.encode_weighted(rendered)]

    def encode_weighted(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Token ids, flagged, with weights.

        Tokens behind the last supervised one are cut: a causal model's loss cannot see them. A
        text whose spans hold no token at all gives an empty array.
        """
        try:
            encodings = self._tokenizer.encode_batch(
                [r.text for r in rendered], add_special_tokens=False
            )
        except BaseException as error:  # a panic of the library is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the tokenizer fails on the data: {reason}; give the model its own tokenizer.json"
            ) from None
        return [self._flag(e, r) for e, r in zip(encodings, rendered, strict=True)]

    def _flag(self, encoding: Any, rendered: Rendered) -> Encoded:
        starts = [_start_of(encoding, a, b) for a, b in rendered.spans]
        if self._byte_level:
            # A token holds characters from both sides of a span's start: an ordinary one that
            # merged, or a special one that strips the spaces beside it.
            straddled = [a for (a, _), s in zip(rendered.spans, starts, strict=True) if s[1] < a]
            if straddled:
                return self._flag_in_pieces(rendered, straddled)
        piece, count = _flag_piece(encoding, rendered, 0, len(rendered.text), starts)
        return _cut(piece, count)

    def _flag_in_pieces(self, rendered: Rendered, cuts: Sequence[int]) -> Encoded:
        """Tokenises the text in pieces, so that none straddles a cut.

        This is what inference does: the prompt is tokenised alone and the answer's tokens follow.
        Exact for byte-level tokenizers, which add nothing at the start of a text.
        """
        borders = [0, *cuts, len(rendered.text)]
        pieces: list[Encoded] = []
        total = count = 0
        for begin, stop in zip(borders, borders[1:], strict=False):
            encoding = self._tokenizer.encode(rendered.text[begin:stop], add_special_tokens=False)
            starts = [
                _start_of(encoding, max(a, begin) - begin, min(b, stop) - begin)
                for a, b in rendered.spans
            ]
            piece, last = _flag_piece(encoding, rendered, begin, stop, starts)
            pieces.append(piece)
            count = total + last if last else count
            total += len(piece.flagged)
        weights = None
        if rendered.weights is not None:
            weights = np.concatenate([p.weights for p in pieces if p.weights is not None])
        return _cut(Encoded(np.concatenate([p.flagged for p in pieces]), weights), count)


def _flag_piece(
    encoding: Any, rendered: Rendered, begin: int, stop: int, starts: Sequence[tuple[int, int]]
) -> tuple[Encoded, int]:
    """The tokens of text[begin:stop], flagged where they train, and how many of them are needed:
    those up to the last supervised one. starts: `_start_of` each span in it.
    """
    ids = _as_array(encoding.ids)
    weights = None if rendered.weights is None else np.zeros(len(ids), dtype=np.float32)
    length = stop - begin
    last = 0
    behind: dict[int, int] = {}  # where a span ends in the text → the token behind it
    for number, ((a, b), (first, char)) in enumerate(zip(rendered.spans, starts, strict=True)):
        if first < 0:
            continue
        end = min(b, stop) - begin
        if char < a - begin:
            first += 1  # half of it belongs to the header, which must not train
        last = _token_behind(encoding, end, length, len(ids))
        if first < last:
            behind[end] = last
        ids[first:last] |= SUPERVISED
        if weights is not None and rendered.weights is not None:
            weight = rendered.weights[number]
            weights[first:last] = 0 if weight == 1 else weight
    for a, b, kind in rendered.kinds:
        start, end = a - begin, b - begin
        token = behind.get(end, 0)
        if token and kind & _END and start >= 0 and _covers(encoding, token - 1, start):
            ids[token - 1] |= kind
        elif a < stop and b > begin:
            _mark(encoding, ids, max(start, 0), min(end, length), length, kind)
    return Encoded(ids, weights), last


def _start_of(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The first token that covers a character of [start, end), and its own first character.

    (-1, start) where there is none.
    """
    for char in range(start, end):
        token = encoding.char_to_token(char)
        if token is not None:
            return token, encoding.token_to_chars(token)[0]
    return -1, start


def _covers(encoding: Any, token: int, char: int) -> bool:
    begin, end = encoding.token_to_chars(token)
    return bool(begin <= char < end)


def _mark(encoding: Any, ids: np.ndarray, start: int, end: int, length: int, kind: int) -> None:
    """Flags the tokens of [start, end): an end wherever it is touched, else only whole tokens."""
    first, char = _start_of(encoding, start, end)
    if first < 0:
        return
    last = _token_behind(encoding, end, length, len(ids))
    if not kind & _END:
        if char < start:
            first += 1
        while last > first and encoding.token_to_chars(last - 1)[1] > end:
            last -= 1
    supervised = ids[first:last]
    supervised[(supervised & SUPERVISED) != 0] |= np.uint32(kind)


def _cut(encoded: Encoded, count: int) -> Encoded:
    weights = encoded.weights
    return Encoded(encoded.flagged[:count], None if weights is None else weights[:count])


def _as_array(ids: list[int]) -> np.ndarray:
    # By way of the standard library's array: three times as fast as numpy's own conversion.
    return np.asarray(array("I", ids), dtype=np.uint32)


def _token_behind(encoding: Any, end: int, length: int, count: int) -> int:
    """The index behind the last token that covers a character before `end`."""
    for char in range(end, length):
        token = encoding.char_to_token(char)
        if token is not None:
            return int(token) + (encoding.token_to_chars(token)[0] < end)
    return count
