"""The mathematics verifier: math-verify decides whether two expressions are equal."""

from __future__ import annotations

from typing import Any

import math_verify
import sympy

from megatron_dft.rollout.matching import after
from megatron_dft.rollout.verdict import Check, Task, Verdict

# The worker's own time limit holds: math-verify's alarms would only hide it.
_NO_LIMIT: dict[str, Any] = {"parsing_timeout": None}


def mathematics(marker: str | None) -> Check:
    """Equal expressions: the sample's last boxed one, or what math-verify finds behind `marker`.

    https://github.com/huggingface/Math-Verify
    """

    def check(task: Task) -> Verdict:
        reference = _parsed(_as_latex(task.answer, marker))
        if not reference:
            return Verdict(None, kind="reference answer that math-verify cannot parse")
        text: str | None = task.text
        if marker is not None:
            text = after(marker, task.text)
            if text is None:
                return Verdict(0.0, kind="sample without the marker")
            text = _as_latex(text, None)
        found = _parsed(text or "")
        if not found:
            return Verdict(0.0, kind="sample without an answer")
        right = math_verify.verify(reference, found, timeout_seconds=None)
        return Verdict(float(right), _vote(found))

    return check


def _as_latex(answer: Any, marker: str | None) -> str:
    """A bare answer is parsed as LaTeX; a worked solution as it stands."""
    text = str(answer)
    if marker is not None:
        text = after(marker, text) or text
    return text if "\\boxed" in text or "$" in text else f"\\boxed{{{text.strip()}}}"


def _parsed(text: str) -> list[Any]:
    # math-verify takes several boxes together; what counts is what was said last.
    last = text.rfind("\\boxed")
    return math_verify.parse(text[max(last, 0) :], **_NO_LIMIT)


def _vote(found: list[Any]) -> str:
    """One form for equal answers, as far as that is cheap: numbers by their value."""
    first = found[0]
    if isinstance(first, sympy.Expr) and first.is_number:
        return str(sympy.N(first, 12))
    return str(first)
