"""Foreign text (a model's name, a licence, a command line) inside Markdown and its YAML head."""

import json
import re
from typing import Any

# What has a meaning in the middle of a line, `$` (formulas) and `<` (HTML) included.
_SPECIAL = re.compile(r"([\\`*\[\]<>$|~])")
# Neither a number, a date, true, null nor anything with a sign of YAML in it.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]*[A-Za-z_][A-Za-z0-9_.-]*)?")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def _clean(text: str) -> str:
    """In one line, without control characters and lone surrogates (names that are not UTF-8)."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain(value: Any) -> str:
    """Text that shows as it is, in a paragraph or a table."""
    return _SPECIAL.sub(r"\\\1", _clean(str(value))).replace("&", "&amp;")


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def code(text: str) -> str:
    """A span of code."""
    text = _clean(text)
    fence = _fence(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def block(text: str) -> str:
    """A block of code; its lines stay."""
    text = "\n".join(_clean(line) for line in text.splitlines())
    fence = _fence(text, 3)
    return f"{fence}\n{text}\n{fence}"


def yaml(text: str) -> str:
    """A string as a YAML scalar: as it is where that is plain, else quoted as JSON, which is YAML
    too."""
    text = _clean(text)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return json.dumps(text)
