"""The elements of one large JSON array, one after the other, without holding all of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from megatron_dft.data.conversation import RowError

_SPACE = " \t\r\n"
_READ_BYTES = 1 << 20


def iterate_array(stream: Any, longest: int) -> Iterator[tuple[Any, int]]:
    """Decoded elements of the array in a binary stream, each with its number of characters.

    Raises RowError, with what is wrong, where the text is not a JSON array; nothing behind that
    point can be read. longest: characters that one element may have.
    """
    text = _Text(stream, longest)
    if text.next_char() != "[":
        raise RowError("not a JSON array")
    text.position += 1
    if text.next_char() == "]":
        return
    while True:
        yield text.element()
        separator = text.next_char()
        text.position += 1
        if separator == "]":
            return
        if separator != ",":
            raise RowError(f"a JSON array needs , or ] behind an element, not {separator!r}")


class _Text:
    """A window on the stream that grows until one element is whole."""

    def __init__(self, stream: Any, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(parse_constant=_refuse_constant)
        self._window, self._ended = "", False
        self.position = 0

    def next_char(self) -> str:
        """The next character that is no space, not consumed; "" at the end."""
        while True:
            while self.position < len(self._window):
                if self._window[self.position] not in _SPACE:
                    return self._window[self.position]
                self.position += 1
            if not self._grow():
                return ""

    def element(self) -> tuple[Any, int]:
        self.next_char()
        while True:
            try:
                value, end = self._json.raw_decode(self._window, self.position)
            except json.JSONDecodeError as error:
                # A number or a string that the window cuts looks broken too, so more is read first.
                if len(self._window) - self.position > self._longest:
                    raise RowError(f"not JSON, or longer than {self._longest} characters") from None
                if not self._grow():
                    raise RowError(f"not JSON: {error.msg}") from None
                continue
            except RecursionError:
                raise RowError("JSON nested too deep") from None
            except RowError:
                raise
            except ValueError as error:  # an integer of more digits than Python converts
                raise RowError(f"not JSON: {error}") from None
            if end == len(self._window) and self._grow():
                continue  # a number may go on
            size, self.position = end - self.position, end
            return value, size

    def _grow(self) -> bool:
        if self._ended:
            return False
        data = self._stream.read(_READ_BYTES)
        self._ended = not data
        try:
            more = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8: {error.reason}") from None
        self._window = self._window[self.position :] + more
        self.position = 0
        return True


def _refuse_constant(name: str) -> Any:
    raise RowError(f"it holds {name}, which is not JSON")
