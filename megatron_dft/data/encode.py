"""Text and characters that train to token ids with the supervised ones flagged.

The mask is read off the tokenizer's offsets: one tokenisation a conversation, and no guess about
where tokens merge.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dft.data.chat_mask import Rendered, TurnRenderer
from megatron_dft.data.schema import Conversation
from megatron_dft.data.spec import SUPERVISED, EncoderSpec


class ChatEncoder:
    """Renders conversations (chat_mask.TurnRenderer) and tokenises them.

    Raises ValueError from the constructor where the template cannot give a right mask at all.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        from tokenizers import Tokenizer

        layout = json.loads(spec.tokenizer_json)
        self._tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        parts = json.dumps([layout.get("pre_tokenizer"), layout.get("decoder")])
        self._byte_level = '"ByteLevel"' in parts
        self.renderer = TurnRenderer(spec)

    def render(self, conversation: Conversation) -> list[Rendered]:
        """As TurnRenderer.render."""
        return self.renderer.render(conversation)

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
        ids = _as_array(encoding.ids)
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
        """Whether a token holds characters from both sides of a span's start.

        An ordinary one that merged, or a special one that strips the spaces beside it.
        """
        first = _token_from(encoding, start, end)
        return first is not None and encoding.token_to_chars(first)[0] < start

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
            ids = _as_array(encoding.ids)
            for start, end in spans:
                first = _token_from(encoding, start, end)
                if first is not None:
                    ids[first : _token_behind(encoding, end, len(text), len(ids))] |= SUPERVISED
            pieces.append(ids)
        ids = np.concatenate(pieces)
        supervised = np.flatnonzero(ids & SUPERVISED)
        return ids[: supervised[-1] + 1] if len(supervised) else ids[:0]


def _as_array(ids: list[int]) -> np.ndarray:
    # By way of the standard library's array: three times as fast as numpy's own conversion.
    return np.array(array("I", ids), dtype=np.uint32)


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
