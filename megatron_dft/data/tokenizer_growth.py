"""How far a tokenizer's own rules can make a text grow: its library bounds neither time nor memory.

Forty rules "a → aa" after each other make 10**12 of one character, where no signal reaches Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TIMES, _ADDED = 64, 4096  # characters: times a text's own, and beside them


def check_growth(layout: dict[str, Any]) -> None:
    """Raises ValueError (one line) where the normaliser or decoder of a tokenizer.json does more
    than one of a real tokenizer, which writes a character for a character."""
    for part in ("normalizer", "decoder"):
        times, added = _growth(layout.get(part))
        if times > _TIMES or added > _ADDED:
            raise ValueError(
                f"the tokenizer's {part} makes texts up to {times:.3g} times as long and "
                f"{added:.3g} characters longer, more than {_TIMES} times or {_ADDED}; give the "
                "model its own tokenizer.json"
            )


def check_file(path: Path) -> None:
    """check_growth of a tokenizer.json before anything is made of it: its library applies the rules
    to added tokens when it loads. A file that is none is left to the library's words."""
    try:
        content = path.read_bytes()
        if b'"Replace"' not in content and b'"Prepend"' not in content:
            return  # large, and nothing in it grows
        layout = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(layout, dict):
        check_growth(layout)


def _growth(rule: Any) -> tuple[float, float]:
    """(times, characters beside them) that a rule makes of a character at most."""
    times, added = 1.0, 0.0
    if not isinstance(rule, dict):
        return times, added
    for value in rule.values():
        for inner in value if isinstance(value, list) else [value]:
            by, more = _growth(inner)
            times, added = min(times * by, 1e300), min(added * by + more, 1e300)
    content, pattern = rule.get("content"), rule.get("pattern")
    if isinstance(content, str) and isinstance(pattern, dict):
        replaced = len(str(pattern.get("String") or ""))  # an expression may match nothing at all
        times *= max(len(content) / replaced if replaced else len(content) + 1, 1)
    for key in ("prepend", "prefix"):
        if isinstance(rule.get(key), str):
            added += len(rule[key])
    return times, added
