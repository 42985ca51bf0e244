"""A run whose end tokens stay unlikely says so, and what to do."""

import pytest
import torch

from megatron_dft.losses.report import END_PROB
from megatron_dft.training.end_watch import STEPS, EndWatch


def watched(*values: float) -> EndWatch:
    watch = EndWatch()
    for value in values:
        watch.log({END_PROB: torch.tensor(value), "lm loss": torch.tensor(1.0)})
    return watch


def test_unlikely_ends_are_told_with_their_flag():
    # The steps that count are the last ones; one without any end has no mean.
    said = watched(*[0.9] * 5, *[0.1] * (STEPS - 1), float("nan")).warning("dft", "none")
    assert said is not None and "0.100" in said and f"last {STEPS - 1} steps" in said
    assert "--dft-full-weight end" in said


@pytest.mark.parametrize(("loss", "full_weight"), [("sft", "none"), ("dft", "end")])
def test_what_the_flag_would_not_help_is_told_otherwise(loss, full_weight):
    said = watched(0.1).warning(loss, full_weight)
    assert said is not None and "train longer" in said and "--dft-full-weight" not in said


@pytest.mark.parametrize("values", [(), (float("nan"),), (0.5,), (0.1, 0.95)])
def test_nothing_is_said_where_ends_are_likely_or_unknown(values):
    assert watched(*values).warning("dft", "none") is None


def test_figures_without_ends_are_passed_over():
    watch = EndWatch()
    watch.log({"lm loss": torch.tensor(1.0)})
    assert watch.warning("dft", "none") is None
