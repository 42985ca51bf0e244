"""Samples from a server that works, fails, answers in parts, or dies in the middle."""

import pytest

from megatron_dft.rollout.draws import BackendGone, Decoding, sample_seed
from megatron_dft.rollout.endpoint_backend import EndpointBackend
from megatron_dft.rollout.prompts import Prompt
from megatron_dft.rollout.sampler import draw_samples
from megatron_dft.rollout.store import read_samples
from tests.rollout.server import answer, serving

PROMPTS = [Prompt(n, [{"role": "user", "content": f"q{n}"}], n, f"f:{n + 1}") for n in range(6)]
DECODING = Decoding(temperature=0.7, top_p=0.9, max_tokens=16, seed=5)


def draw(server, directory, retries=2, concurrency=4, decoding=DECODING, **flags):
    backend = EndpointBackend(
        server.url,
        "tiny",
        decoding,
        retries=retries,
        first_wait=0.001,
        concurrency=concurrency,
        timeout=20.0,
        **flags,
    )
    return draw_samples(directory, PROMPTS, 2, decoding, backend)


def expected(key):
    return f"q{key[0]}/{sample_seed(5, *key)}"


def check_all(directory):
    found = {(r["prompt"], r["sample"]): r["text"] for r in read_samples(directory)}
    assert found == {(p, s): expected((p, s)) for p in range(6) for s in range(2)}


def test_every_answer_is_asked_for_once_with_its_seed(tmp_path):
    with serving() as server:
        outcome = draw(server, tmp_path, key="k")
        assert server.asked == 12
    check_all(tmp_path)
    path, body, headers = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k"
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 16)
    assert outcome.tokens == 60 and outcome.missing == 0
    assert "k" not in (tmp_path / "settings.json").read_text().split('"')


def test_raw_prompts_go_to_completions_with_stop_texts(tmp_path):
    with serving() as server:
        how = Decoding(temperature=0.7, max_tokens=16, seed=5, stop=("\n",))
        draw(server, tmp_path, raw=True, decoding=how)
    check_all(tmp_path)
    path, body, _ = server.seen[0]
    assert path == "/v1/completions" and body["stop"] == ["\n"] and "messages" not in body


@pytest.mark.parametrize(
    "failure",
    [
        (500, b"oops"),
        (429, {"error": "slow down"}),
        (200, b'{"choices": [{"mess'),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
        (200, {"choices": [{"message": {"content": "half"}, "finish_reason": None}]}),
        None,
    ],
)
def test_a_failure_now_and_then_is_asked_again(failure, tmp_path):
    with serving(lambda n, body: failure if n % 3 == 1 else (200, answer(body))) as server:
        outcome = draw(server, tmp_path, retries=8, concurrency=2)
    check_all(tmp_path)
    assert outcome.missing == 0 and server.asked > 12


def test_one_prompt_that_the_server_refuses_costs_that_prompt_alone(tmp_path):
    def behave(_, body):
        refused = body["messages"][-1]["content"] == "q3"
        return (400, {"error": "too long"}) if refused else (200, answer(body))

    with serving(behave) as server:
        outcome = draw(server, tmp_path)
        assert server.asked == 12  # a refusal is not asked again
    assert outcome.samples == 10 and outcome.missing == 2
    assert str(outcome.faults) == "2 × answer refused with HTTP 400 (first: f:4)"


def test_answers_that_end_otherwise_are_counted_not_stored(tmp_path):
    with serving(lambda n, body: (200, answer(body, finish_reason="content_filter"))) as server:
        outcome = draw(server, tmp_path, concurrency=8)
    assert outcome.samples == 0 and outcome.missing == 12
    assert outcome.faults.counts == {"answer that ended with 'content_filter'": 12}


def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path):
    with serving() as server:

        def behave(number, body):
            if number == 5:
                server.socket.close()  # no new connection from here on
            return (200, answer(body)) if number < 5 else None

        server.behave = behave
        with pytest.raises(BackendGone, match="what it answered is stored") as caught:
            draw(server, tmp_path, concurrency=1)
    assert "\n" not in str(caught.value)
    stored = read_samples(tmp_path)
    assert len(stored) == 5
    with serving() as server:
        outcome = draw(server, tmp_path)
        assert server.asked == 7 and outcome.kept == 5
    check_all(tmp_path)
    assert read_samples(tmp_path)[:1] == stored[:1]


def test_a_server_that_fails_every_answer_is_as_good_as_gone(tmp_path):
    with serving(lambda n, body: (500, b"")) as server:
        with pytest.raises(BackendGone, match="failures in a row, answer refused with HTTP 500"):
            draw(server, tmp_path, retries=0, concurrency=1)
        assert server.asked < 12


@pytest.mark.parametrize(("status", "word"), [(401, "refuses the key"), (404, "no such path")])
def test_a_server_that_refuses_us_is_told_at_once(status, word, tmp_path):
    with serving(lambda n, body: (status, b"")) as server:
        with pytest.raises(BackendGone, match=word):
            draw(server, tmp_path, concurrency=1)
        assert server.asked == 1


def test_reasoning_that_the_server_takes_out_is_refused(tmp_path):
    message = {"content": "4", "reasoning_content": "2 and 2"}
    with serving(lambda n, body: (200, answer(body, message=message))) as server:
        with pytest.raises(BackendGone, match="without its reasoning parser"):
            draw(server, tmp_path)


def test_wrong_addresses_and_models_are_one_line():
    with pytest.raises(ValueError, match="expected http://"):
        EndpointBackend("127.0.0.1:8000", "tiny", DECODING)
    with serving(models=("big", "bigger")) as server:
        with pytest.raises(ValueError, match="serves big, bigger"):
            EndpointBackend(server.url, "tiny", DECODING)
    with pytest.raises(ValueError, match="nothing answers there"):
        EndpointBackend(server.url, "tiny", DECODING)
