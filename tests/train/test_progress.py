"""The progress line: what a person reads, and what is taken out of Megatron's log."""

import io

import pytest
from rich.console import Console

from megatron_dft.losses.report import HISTOGRAM_BINS, SOURCE, TOKENS, histogram_key
from megatron_dft.training import progress


def _losses(shares):
    figures = {"lm loss": 1.25, "dft loss": 0.125, "dft/mean-prob": 0.5, "dft/mean-weight": 0.5}
    return figures | {histogram_key(i): s for i, s in enumerate(shares)} | {TOKENS: 10.0}


@pytest.fixture
def now(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def _call(step):
    return {"iteration": step, "grad_norm": 0.5, "learning_rate": 1e-3}


def test_plain_lines_have_rate_and_time_left(now, capsys):
    line = progress.Progress("plain", True, micro_batches=4, steps=10, interval=1)
    shares = [0.0] * 9 + [1.0]
    for step in (1, 2):
        losses = _losses(shares)
        line.log(losses, _call(step))
        assert set(losses) == {"lm loss", "dft loss", "dft/mean-prob", "dft/mean-weight"}
        now[0] += 2.0
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens/s" not in first
    # 4 micro-batches of 10 tokens in 2 s; 8 steps of 2 s are left.
    assert "20 trained tokens/s | 0:16 left" in second
    assert "lm loss 1.2500 | dft loss 0.1250 | p 0.500 | weight 0.500" in second
    assert second.endswith("p 0▕         █▏1")


def test_the_items_of_the_data_have_their_losses_in_the_line(now, capsys):
    def said(items):
        line = progress.Progress("plain", True, 4, 10, 1)
        line.log(_losses([1.0] * 10) | {f"{SOURCE}{k}": v for k, v in items.items()}, _call(1))
        return capsys.readouterr().out

    # An item without tokens in this step has no loss; one called so is no objective.
    text = said({"a/maths.jsonl": 1.5, "a/chat loss": 2.0, "a/none.jsonl": float("nan")})
    assert "dft loss 0.1250 | maths.jsonl 1.5000 | chat loss 2.0000 | p 0.500" in text
    assert "a/x.jsonl 1.0000 | b/x.jsonl 2.0000" in said({"a/x.jsonl": 1.0, "b/x.jsonl": 2.0})
    assert "3.jsonl 3.0000 | and 2 items" in said({f"{i}.jsonl": float(i) for i in range(6)})


def test_a_rank_without_figures_says_nothing(now, capsys):
    for line in (
        progress.Progress("plain", False, 4, 10, 1),
        progress.Progress("off", True, 4, 10, 1),
    ):
        line.log(_losses([0.1] * HISTOGRAM_BINS), _call(1))
        line.log({}, _call(2))
    assert capsys.readouterr().out == ""


def test_rich_lines_on_a_terminal(now):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, soft_wrap=True)
    line = progress.Progress("rich", True, 4, 10, 1, console=console)
    line.log(_losses([1.0] + [0.0] * 9), _call(1))
    assert "\x1b[" in out.getvalue() and "step 1/10" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
