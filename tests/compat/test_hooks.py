"""Replacing a function of somebody else: composed, repeatable, reversible, loud where it moved."""

import sys
import types

import pytest

from megatron_dft import compat
from megatron_dft.compat import hooks

PLACE = "stand_in:work"


class Thing:
    def method(self):
        return ["method"]


@pytest.fixture
def stand_in(monkeypatch):
    """A module with a function, a class and a value, all of them in the table."""
    module = types.ModuleType("stand_in")
    module.work = lambda: ["work"]
    module.Thing = type("Thing", (Thing,), {})
    module.value = 1
    monkeypatch.setitem(sys.modules, "stand_in", module)
    for name in ("work", "value", "Thing.method"):
        monkeypatch.setitem(compat.WRAPPED, f"stand_in:{name}", "a test")
    yield module
    hooks.undo()


def first(original):
    return lambda *args: [*original(*args), "first"]


def second(original):
    return lambda *args: [*original(*args), "second"]


def test_layers_compose_in_the_order_of_their_first_wrap(stand_in):
    hooks.wrap(PLACE, first)
    hooks.wrap(PLACE, second)
    assert stand_in.work() == ["work", "first", "second"]


def test_a_second_call_takes_the_place_of_the_first(stand_in):
    for _ in range(3):
        hooks.wrap(PLACE, first)
    hooks.wrap(PLACE, second)
    hooks.wrap(PLACE, first)
    assert stand_in.work() == ["work", "first", "second"]


def test_everything_can_be_undone(stand_in):
    original, method = stand_in.work, Thing.method
    hooks.wrap(PLACE, first)
    hooks.wrap("stand_in:Thing.method", second)
    hooks.wrap("stand_in:value", lambda value: value + 1)
    assert stand_in.Thing().method() == ["method", "second"] and stand_in.value == 2
    assert hooks.replaced() == {PLACE, "stand_in:Thing.method", "stand_in:value"}
    hooks.undo()
    assert stand_in.work is original and stand_in.value == 1
    # It was inherited: nothing of it may stay on the class.
    assert "method" not in vars(stand_in.Thing) and stand_in.Thing.method is method
    assert hooks.replaced() == frozenset()


def test_a_with_block_takes_away_its_own_layer_alone(stand_in):
    hooks.wrap(PLACE, first)
    with hooks.wrapped(PLACE, second):
        assert stand_in.work() == ["work", "first", "second"]
    assert stand_in.work() == ["work", "first"]


@pytest.mark.parametrize("place", ["stand_in:gone", "stand_in:Thing.gone", "no_such_module:work"])
def test_a_name_that_is_gone_is_one_line_with_the_reason(stand_in, monkeypatch, place):
    monkeypatch.setitem(compat.WRAPPED, place, "the reason for it")
    for call in (lambda: hooks.wrap(place, first), hooks.check_release):
        with pytest.raises(hooks.ReleaseError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and "the reason for it" in message
        assert place in message


def test_what_is_not_in_the_table_is_not_replaced(stand_in):
    with pytest.raises(AssertionError, match="not in compat.WRAPPED"):
        hooks.wrap("stand_in:other", first)
