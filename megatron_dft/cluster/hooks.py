"""Wrapping functions of Megatron's training loop: composable, and loud where a symbol has moved."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` (a module's or a class's) by `make(the present one)`.

    Raises RuntimeError where there is no such function: this release is not known here.
    """
    present = getattr(owner, name, None)
    if not callable(present):
        where = getattr(owner, "__name__", owner)
        raise RuntimeError(f"megatron-core {version('megatron-core')}: {where}.{name} moved")
    setattr(owner, name, functools.wraps(present)(make(present)))
