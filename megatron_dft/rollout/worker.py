"""The process that runs a verifier: JSON lines in, verdicts out.

A process of its own, so that a verifier may hang, crash or use up its memory: `verifiers.py` ends
it and starts the next one.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dft.rollout.verdict import Check, Task, Verdict, from_value

_OWN_KINDS_GIB = 4


def load(spec: dict[str, Any]) -> Check:
    """The check that `spec` names. Raises ValueError where it cannot be had."""
    kind = spec["kind"]
    if kind == "exact":
        return importlib.import_module("megatron_dft.rollout.matching").exact(spec["marker"])
    if kind == "regex":
        return importlib.import_module("megatron_dft.rollout.matching").regex(spec["pattern"])
    if kind == "math":
        try:
            module = importlib.import_module("megatron_dft.rollout.mathematics")
        except ImportError as error:
            raise ValueError(
                f"--verifier math: {error}; pip install 'megatron-dft[verify]'"
            ) from None
        return module.mathematics(spec["marker"])
    return user_function(spec["function"])


def user_function(name: str) -> Check:
    """`module:function` or `file.py:function`, called with (text, answer, messages)."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place:
        raise ValueError(f"--function {name!r}: expected module:function or file.py:function")
    try:
        function: Callable[..., Any] = getattr(_module(place), attribute)
    except Exception as error:  # the user's module may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--function {name!r} cannot be had: {type(error).__name__}: {reason}"
        ) from None

    def check(task: Task) -> Verdict:
        return from_value(function(task.text, task.answer, task.messages))

    return check


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(check: Check, task: Task) -> Verdict:
    """The verdict; what the verifier raises is one too."""
    try:
        return check(task)
    except MemoryError:
        return Verdict(None, kind="verifier that ran out of memory")
    except Exception as error:
        return Verdict(None, kind=f"verifier that raised {type(error).__name__}")


def main() -> None:
    # What the verifier prints may not end up between the verdicts.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    if spec["kind"] != "python":
        limit = _OWN_KINDS_GIB << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def reply(record: dict[str, Any]) -> None:
        replies.write(json.dumps(record) + "\n")
        replies.flush()

    try:
        check = load(spec)
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({"error": None})
    for line in sys.stdin:
        reply(dataclasses.asdict(judge(check, Task(**json.loads(line)))))


if __name__ == "__main__":
    main()
