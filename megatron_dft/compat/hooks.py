"""The one way in which a function or object of another package is replaced.

A place is written "module:name" or "module:Class.name" and must stand in `compat.WRAPPED`. Its
original is kept: each `wrap` adds a layer round it, a second call of the same `make` takes the
first one's place, and `undo` puts the original back.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from megatron_dft.compat import PROVIDED, WRAPPED

Make = Callable[[Any], Any]

_INHERITED = object()


class ReleaseError(ValueError):
    """The installed Megatron or torch lacks a name that is replaced here."""


class _Place:
    """One replaced attribute: its owner, what it was, and the layers round it in their order."""

    def __init__(self, place: str) -> None:
        assert place in WRAPPED, f"{place} is not in compat.WRAPPED"
        module, _, path = place.partition(":")
        *owners, self.name = path.split(".")
        try:
            self.owner: Any = importlib.import_module(module)
            for name in owners:
                self.owner = getattr(self.owner, name)
            self.original = getattr(self.owner, self.name)
        except (ImportError, AttributeError):
            raise ReleaseError(
                f"megatron-core {version('megatron-core')}: expected {place}, which is replaced "
                f"here ({WRAPPED[place]}), and it is not there any more; install a release that "
                "this package was tested with"
            ) from None
        self._own = vars(self.owner).get(self.name, _INHERITED)
        self.layers: dict[str, Make] = {}

    def apply(self) -> None:
        value = self.original
        for make in self.layers.values():
            inner, value = value, make(value)
            if isinstance(inner, types.FunctionType) and isinstance(value, types.FunctionType):
                functools.update_wrapper(value, inner)
        if self.layers:
            setattr(self.owner, self.name, value)
        elif self._own is _INHERITED:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._own)


_places: dict[str, _Place] = {}


def _key(make: Make) -> str:
    return f"{make.__module__}.{make.__qualname__}"


def wrap(place: str, make: Make) -> None:
    """Replace what stands at `place` by `make(what stands there)`, round earlier wraps.

    Calling it again with the same `make` (told by module and qualified name) takes the place of the
    earlier one.

    Raises:
        ReleaseError: there is no such name in the installed release.
    """
    found = _places.get(place) or _Place(place)
    found.layers[_key(make)] = make
    found.apply()
    _places[place] = found


def unwrap(place: str, make: Make) -> None:
    """Take one layer away again."""
    found = _places[place]
    del found.layers[_key(make)]
    found.apply()
    if not found.layers:
        del _places[place]


@contextlib.contextmanager
def wrapped(place: str, make: Make) -> Iterator[None]:
    """`wrap` for the length of a with block."""
    wrap(place, make)
    try:
        yield
    finally:
        unwrap(place, make)


_provided: dict[str, list[str]] = {}


def provide(name: str, functions: Sequence[Callable[..., Any]], users: Sequence[str]) -> None:
    """Let `import name` give a module of these functions, where there is none; again: no change.

    users: modules that import it at their top; those imported before now get it as well.
    """
    assert name in PROVIDED, f"{name} is not in compat.PROVIDED"
    module = types.ModuleType(name, PROVIDED[name])
    # importlib.util.find_spec raises for a module without a spec.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update({function.__name__: function for function in functions})
    sys.modules[name] = module
    _provided[name] = list(users)
    for user in users:
        if user in sys.modules:
            setattr(sys.modules[user], name, module)


def is_provided(name: str) -> bool:
    """Whether `provide` stands in for that module now."""
    return name in _provided


def undo() -> None:
    """Put back every original, and take away what was provided."""
    for found in reversed(_places.values()):
        found.layers.clear()
        found.apply()
    _places.clear()
    for name, users in _provided.items():
        del sys.modules[name]
        for user in users:
            if hasattr(sys.modules.get(user), name):
                delattr(sys.modules[user], name)
    _provided.clear()


def replaced() -> frozenset[str]:
    """The places that are replaced now."""
    return frozenset(_places)


def check_release() -> None:
    """Raise ReleaseError for the first name of the table that the installed release lacks.

    Imports Megatron's training loop.
    """
    for place in WRAPPED:
        _Place(place)
