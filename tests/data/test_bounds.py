"""A chat template that runs on or asks for all memory is given up, with a line; others are not."""

import resource
import signal
import subprocess
import sys
import time

import pytest

from megatron_dft.data import bounds, workers
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import RowError, parse_row
from megatron_dft.data.tokenizer import encoder_spec
from megatron_dft.rollout.chat import Rendering, stop_ids
from tests.data.fixtures import CHATML_TEMPLATE, chat, chatml_tokenizer
from tests.data.masks import encode

_ENDLESS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = a * b %}{% endfor %}"
    "{% endfor %}"
)
_NESTED = (
    "{% macro m(n) %}{% for i in range(9) %}{{ m(n + 1) if n < 12 }}{% endfor %}{% endmacro %}"
)
_HUGE = {
    "constant": "{{ 'a' * 9000000000 }}",
    "filter": "{{ messages[0].content | center(9000000000) }}",
    "doubled": "{% set n = namespace(s=messages[0].content * 10000) %}"
    "{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "format": "{{ '%09000000000d' | format(messages | length) }}",
}
_SLOW = {"loops": _ENDLESS, "recursion": _NESTED + "{{ m(0) }}"}


@pytest.fixture(autouse=True)
def short(request, monkeypatch):
    """Little time for what loops; what grows keeps its own: it may be slow to come to 2 GiB."""
    if not any(f"[{kind}]" in request.node.name for kind in _HUGE):
        monkeypatch.setattr(bounds, "SECONDS", 0.3)
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)
    yield
    assert resource.getrlimit(resource.RLIMIT_DATA) == before[0]
    assert (
        signal.getitimer(signal.ITIMER_VIRTUAL)[0] == signal.getitimer(signal.ITIMER_PROF)[0] == 0
    )
    signal.signal(signal.SIGVTALRM, before[1] or signal.SIG_DFL)


def _encoder(template):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    return ChatEncoder(encoder_spec(tokenizer))


@pytest.mark.parametrize("kind", [*_SLOW, *_HUGE])
def test_at_the_start(kind):
    template = {**_SLOW, **_HUGE}[kind] + CHATML_TEMPLATE
    expected = "more than 0.3 s of CPU time" if kind in _SLOW else "more than 2 GiB"
    with pytest.raises(ValueError, match=f"chat template.*{expected}.*--chat-template FILE"):
        _encoder(template)


def test_on_a_prompt_and_on_the_probe_of_ends():
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = _ENDLESS + CHATML_TEMPLATE
    with pytest.raises(ValueError, match="refuses a prompt: it takes more than 0.3 s"):
        Rendering().ids(tokenizer, chat("a"))
    assert stop_ids(tokenizer, 5) == {5, tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", [*_SLOW, *_HUGE])
def test_on_a_row(kind):
    """Behind a word that the probes at the start do not hold; the next row is encoded."""
    bad = {**_SLOW, **_HUGE}[kind]
    if kind == "constant":  # a constant would be made at the start
        bad = "{{ messages[0].content * 9000000000 }}"
    guard = "{% if 'trigger' in messages[0].content %}" + bad + "{% endif %}"
    encoder = _encoder(guard + CHATML_TEMPLATE)
    expected = "more than 0.3 s of CPU time" if kind in _SLOW else "more than 2 GiB"
    for _ in range(2):
        with pytest.raises(RowError, match=expected):
            encode(encoder, {"messages": chat("trigger", "b")})
        assert len(encode(encoder, {"messages": chat("a", "b")})) == 1


def test_in_a_batch_each_row_has_its_own_time_and_what_lies_between_has_none(monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS", 0.1)
    guard = "{% if 'trigger' in messages[0].content %}" + _ENDLESS + "{% endif %}"
    encoder = _encoder(guard + CHATML_TEMPLATE)
    good, bad = (parse_row({"messages": chat(word, "b")}, None) for word in ("a", "trigger"))
    begin = time.process_time()
    with encoder.renderer.batch():
        limit = resource.getrlimit(resource.RLIMIT_DATA)
        while time.process_time() < begin + 0.2:  # many renderings in more than the time of one
            assert len(encoder.render(good)) == 1
        while time.process_time() < begin + 0.4:  # and what is no rendering
            pass
        with pytest.raises(RowError, match="more than 0.1 s of CPU time"):
            encoder.render(bad)
        assert len(encoder.render(good)) == 1
        assert resource.getrlimit(resource.RLIMIT_DATA) == limit, "set once for all of them"


_TOWER = (
    "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(64) %}"
    "{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}"
)
_STUCK = {"hash": "{{ {n.a: 1} }}", "equality": "{{ n.a == n.b }}", "search": "{{ n.a in [n.b] }}"}
_PROGRAM = """
import sys
from megatron_dft.data import bounds
from megatron_dft.data.template import ChatTemplate
bounds.SECONDS = 0.1
with bounds.Bounded():
    ChatTemplate({"default": sys.argv[1]}, {}).render([])
"""


@pytest.mark.parametrize("kind", _STUCK)
def test_one_operation_that_never_comes_back_ends_the_process(kind):
    words = [sys.executable, "-c", _PROGRAM, "\n" + _TOWER + _STUCK[kind]]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGPROF
    assert 'File "<template>", line' in ended.stderr.splitlines()[1]


def test_the_line_of_a_tokenising_process_that_ended_so():
    worker = workers._Worker.__new__(workers._Worker)
    worker._process = subprocess.Popen(
        ["sh", "-c", "kill -PROF $$"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with pytest.raises(ValueError, match="chat template.* more than 60 s of CPU time; give anot"):
        worker.ask(None)
    worker.close()
