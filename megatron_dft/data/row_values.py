"""The values of a row: what kind they are, in words, and whether their text is text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_dft.data.conversation import RowError
from megatron_dft.data.template import has_marks


def kind_of(value: Any) -> str:
    """A value's kind as JSON calls it."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "text", bool: "true or false",
        int: "a number", float: "a number", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value for a message of one line, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = kind_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_text(text: str, where: str) -> None:
    """Raises RowError for what no tokenizer takes: lone surrogates, NUL, this package's marks."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"{where} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which is no text"
            ) from None
        if has_marks(text):
            raise RowError(f"{where} holds a private-use character U+10FFF0 or U+10FFF1")
    if "\0" in text:
        raise RowError(f"{where} holds a NUL character")


def check_leaves(value: Any, where: str) -> bool:
    """check_text on every text inside a nested value; whether it holds a null.

    Raises RowError for values that JSON does not have (bytes and dates of table formats, NaN).
    """
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping):
        return any([check_leaves(v, where) for pair in value.items() for v in pair])
    elif isinstance(value, list):
        return any([check_leaves(v, where) for v in value])
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{where} holds {value}, which is not JSON")
    elif not isinstance(value, bool | int | float | None):
        raise RowError(f"{where} holds {type(value).__name__}, which is not JSON")
    return value is None


def decode_json(text: str, where: str) -> Any:
    """JSON inside a text of the row; RowError with `where` where it is none."""
    try:
        return json.loads(text, parse_constant=lambda name: _refuse_constant(name, where))
    except json.JSONDecodeError as error:
        raise RowError(f"{where} is not JSON: {error.msg}") from None
    except RecursionError:
        raise RowError(f"{where} is JSON nested too deep") from None
    except ValueError as error:  # an integer of thousands of digits; our own refusal
        raise error if isinstance(error, RowError) else RowError(f"{where}: {error}") from None


def column(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """A column of a row, of that kind; RowError where it is another or missing."""
    value = row.get(name)
    if isinstance(value, float) and math.isnan(value):
        raise RowError(f'"{name}" is NaN')
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        came = "missing" if name not in row else kind_of(value)
        raise RowError(f'"{name}" must be {expected}, but is {came}')
    return value


def _refuse_constant(name: str, where: str) -> Any:
    raise RowError(f"{where} holds {name}, which is not JSON")
