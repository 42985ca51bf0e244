"""Malformed rows and templates: a reason of one line each, never a traceback, a hang or a file."""

import json
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron_dft.data.batches import RowBatch
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.reading import Reading
from megatron_dft.data.spec import END, SUPERVISED, WRITTEN
from megatron_dft.data.template import TemplateDateError
from megatron_dft.data.tokenize_rows import tokenize_batch
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import chat
from tests.data.malformed import ROWS, TEMPLATES, WHOLE_TEMPLATES
from tests.data.tool_templates import calling, chatml

_SECONDS = 5
_ALL = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
ENCODERS: dict[int, ChatEncoder] = {}


def _encoder(number):
    """One of the whole templates, over its own special tokens, tolerant of dropped parts or not."""
    if number not in ENCODERS:
        families = list(FAMILIES.values())
        at = number // 2
        tokenizer = families[at].tokenizer() if at < len(families) else chatml(
            WHOLE_TEMPLATES[(at - len(families)) % 6])[0]  # fmt: skip
        ENCODERS[number] = ChatEncoder(
            encoder_spec(tokenizer, drops=("refuse", "warn")[number % 2])
        )
    return ENCODERS[number]


class _Alarm:
    """Fails a case that hangs."""

    def __enter__(self):
        def ring(*_):
            raise AssertionError(f"more than {_SECONDS} s")

        self._before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, _SECONDS)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def _tokenise(rows, encoder):
    result = tokenize_batch(RowBatch(0, list(range(1, len(rows) + 1)), rows), encoder, Reading())
    counts, block = result.block.counts, result.block
    assert all(b.reason and "\n" not in b.reason and len(b.reason) < 1500 for b in result.bad)
    assert counts["bad_rows"] == len(result.bad) and counts["rows"] == len(rows)
    # Whatever trains has an end of its own, and no kind is set on what does not train.
    trains = (block.tokens & SUPERVISED) != 0
    assert not (block.tokens[~trains] & (END | WRITTEN)).any()
    assert len(block.tokens) == block.lengths.sum() and (block.lengths >= 2).all()
    if block.weights is not None:
        assert np.isfinite(block.weights).all() and (block.weights >= 0).all()
        assert not block.weights[~trains].any()
    return result


def _check_row(layout, number, row, as_line):
    raw = row
    if as_line:
        raw = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
    with _Alarm():
        _tokenise([raw, {"messages": chat("a", "b")}], _encoder(number))


def _check_template(template):
    with _Alarm():
        try:
            _, encoder = chatml(template, drops="warn")
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            return
        rows = [
            {"messages": chat("a", "b", "c", "d", system="s")},
            {"messages": calling(None), "tools": [{"name": "f"}]},
            {"messages": [*chat("q"), {"role": "assistant", "content": "a", "thinking": "t"}]},
        ]
        try:
            _tokenise(rows, encoder)
        except TemplateDateError as error:  # the template's fault, and a line to mend it
            assert "\n" not in str(error)


def _fuzz(examples, strategies, check):
    run = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=_ALL)
    seed(20)(run(given(*strategies)(check)))()


def _rows(layout, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = (ROWS[layout], st.integers(0, 25), st.booleans())
    _fuzz(examples, cases, lambda row, number, line: _check_row(layout, number, row, line))
    assert not list(tmp_path.iterdir())


def _templates(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _fuzz(examples, (TEMPLATES,), _check_template)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ROWS)
def test_malformed_rows_are_reasons_of_one_line(layout, tmp_path, monkeypatch):
    _rows(layout, 150, tmp_path, monkeypatch)


def test_malformed_templates_are_reasons_of_one_line(tmp_path, monkeypatch):
    _templates(150, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ROWS)
def test_many_malformed_rows(layout, tmp_path, monkeypatch):
    _rows(layout, 2500, tmp_path, monkeypatch)


@pytest.mark.slow
def test_many_malformed_templates(tmp_path, monkeypatch):
    _templates(2500, tmp_path, monkeypatch)
