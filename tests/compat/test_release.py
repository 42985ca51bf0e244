"""Megatron's C++ index helpers: made where they are missing, and not where a wheel brings them."""

import pytest

from megatron_dft.compat import hooks, release


@pytest.mark.parametrize("built", [True, False])
def test_make_runs_only_where_the_helpers_are_not_there(built, monkeypatch):
    from megatron.core.datasets import utils

    made = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: made.append("make"))
    if not built:
        monkeypatch.setattr(release.importlib.util, "find_spec", lambda name: None)
    release.skip_built_helpers()
    utils.compile_helpers()
    hooks.undo()
    assert made == ([] if built else ["make"])


def test_without_it_the_wheel_ends_the_job():
    """The reason why it is there: the wheel has no Makefile."""
    from megatron.core.datasets import utils

    with pytest.raises(SystemExit):
        utils.compile_helpers()
