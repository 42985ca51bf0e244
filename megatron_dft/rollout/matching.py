"""Verifiers that look for an answer in the text: exact match and a regular expression."""

from __future__ import annotations

import re
from collections import deque
from decimal import MAX_EMAX, MIN_EMIN, Context, DecimalException
from typing import Any

from megatron_dft.rollout.verdict import Check, Task, Verdict

_NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WRAPPING = "$ .*"
_PLAIN_DIGITS = 40  # 1e999999 is not written out


def exact(marker: str | None) -> Check:
    """Equal texts: what follows the last `marker` on its line, or the whole text without one."""

    def check(task: Task) -> Verdict:
        wanted = str(task.answer)
        if marker is None:
            return compare(task.text, wanted)
        found = after(marker, task.text)
        if found is None:
            return Verdict(0.0, kind="sample without the marker")
        return compare(found, after(marker, wanted) or wanted)

    return check


def regex(pattern: str) -> Check:
    """Equal texts: the last match (its first group, if it has one); in the reference too."""
    compiled = compile_pattern(pattern)

    def check(task: Task) -> Verdict:
        found, wanted = _last(compiled, task.text), str(task.answer)
        if found is None:
            return Verdict(0.0, kind="sample without a match of --pattern")
        return compare(found, _last(compiled, wanted) or wanted)

    return check


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Raises ValueError for a pattern that is none."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"--pattern {pattern!r}: {error}; mend the expression") from None


def compare(found: str, wanted: str) -> Verdict:
    answer = canonical(found)
    return Verdict(float(answer == canonical(wanted)), answer)


def canonical(text: Any) -> str:
    """One form for equal answers: blanks trimmed; numbers as numbers, 1,234 as 1234.0 and $1234."""
    plain = " ".join(str(text).split())
    bare = plain.strip(_WRAPPING) if not plain.startswith(".") else plain.rstrip(_WRAPPING)
    return _number(bare) if _NUMBER.fullmatch(bare) else plain


def _number(text: str) -> str:
    """Exact, whatever the number of digits."""
    whole = Context(prec=len(text), Emax=MAX_EMAX, Emin=MIN_EMIN)
    try:
        value = whole.create_decimal(text.replace(",", "")).normalize(whole)
    except DecimalException:  # an exponent beyond all bounds
        return text
    if not value:
        return "0"  # and -0 is 0
    return f"{value:f}" if abs(value.adjusted()) < _PLAIN_DIGITS else str(value)


def after(marker: str, text: str) -> str | None:
    """The rest of the line behind the last marker; None without one."""
    before, found, rest = text.rpartition(marker)
    return (rest.strip().splitlines() or [""])[0] if found else None


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    last = deque(pattern.finditer(text), maxlen=1)
    if not last:
        return None
    match = last[0]
    return match.group(1) if pattern.groups and match.group(1) is not None else match.group(0)
