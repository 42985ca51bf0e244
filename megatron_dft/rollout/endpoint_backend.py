"""Samples from an OpenAI-compatible server: one request an answer, many at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from megatron_dft.rollout import chat_completions as protocol
from megatron_dft.rollout.draws import Answer, BackendGone, Decoding, Draw, Fault, Result
from megatron_dft.rollout.prompts import Prompt

_WAIT_MOST_SECONDS = 30.0
# Whatever is asked, these say the same again.
_REFUSED = {401: "it refuses the key", 403: "it refuses the key", 404: "no such path or model"}


class EndpointBackend:
    """A server at `url`, up to and with `/v1`; timeout: [seconds] of one answer.

    An answer that fails after all retries is a counted fault. The server counts as gone where it
    could not be reached in all of them, or when `3 * concurrency` answers failed in a row.
    """

    name = "endpoint"
    whole_batches = False
    batch_size = 1024

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding,
        *,
        raw: bool = False,
        key: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 5,
        first_wait: float = 0.5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {url!r}: expected http://HOST:PORT/v1 or https://…")
        if concurrency < 1:
            raise ValueError(f"--concurrency: expected 1 or more, got {concurrency}")
        self._url, self._model, self._decoding, self._raw = url.rstrip("/"), model, decoding, raw
        self._concurrency, self._retries, self._first_wait = concurrency, retries, first_wait
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)
        self._stop = threading.Event()
        self._failed_in_a_row = 0
        self._check_model()

    def identity(self) -> dict[str, Any]:
        return {"backend": self.name, "model": self._model}

    def length(self, prompt: Prompt) -> int:
        return 0

    def room(self) -> int | None:
        return None

    def generate(self, draws: Sequence[Draw]) -> Iterator[list[Result]]:
        pool = ThreadPoolExecutor(self._concurrency)
        gone: BaseException | None = None
        asked: dict[Future[Answer | Fault], Draw] = {pool.submit(self._ask, d): d for d in draws}
        waiting = set(asked)
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                ready = {f for f in ready if not f.cancelled()}
                errors = [e for f in ready if (e := f.exception()) is not None]
                results = [(asked[f], f.result()) for f in ready if f.exception() is None]
                if gone is None:
                    gone = errors[0] if errors else self._given_up(results)
                if gone is not None:
                    for future in waiting:
                        future.cancel()
                if results:
                    yield results
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()
        if gone is not None:
            raise gone

    def _given_up(self, results: Sequence[Result]) -> BackendGone | None:
        """A server that fails every answer is as good as gone."""
        for _, answer in results:
            if isinstance(answer, Answer):
                self._failed_in_a_row = 0
                continue
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= 3 * self._concurrency:
                return self._gone(f"{self._failed_in_a_row} failures in a row, {answer.kind}")
        return None

    def _ask(self, draw: Draw) -> Answer | Fault:
        """Raises BackendGone where the server cannot be reached, or refuses everything."""
        path, body = protocol.request(draw, self._model, self._decoding, self._raw)
        result: Answer | Fault = Fault("answer not asked for, as the server was gone")
        for attempt in range(self._retries + 1):
            if self._stop.wait(self._pause(attempt)):
                break
            try:
                response = self._client.post(self._url + path, json=body)
            except httpx.TransportError as error:
                result = Fault(f"connection that failed ({type(error).__name__})")
                if attempt == self._retries:
                    raise self._gone(f"{type(error).__name__}: {error}") from None
                continue
            if response.status_code in _REFUSED:
                raise self._gone(f"HTTP {response.status_code}, {_REFUSED[response.status_code]}")
            result, again = protocol.read(response.status_code, response.content, self._raw)
            if not again:
                break
        return result

    def _pause(self, attempt: int) -> float:
        return min(self._first_wait * 2 ** (attempt - 1), _WAIT_MOST_SECONDS) if attempt else 0.0

    def _gone(self, why: str) -> BackendGone:
        self._stop.set()  # here already: the threads that wait need not ask
        return BackendGone(
            f"--endpoint {self._url}: {why}; what it answered is stored: start it again and run "
            "the same command for the rest"
        )

    def _check_model(self) -> None:
        """Raises ValueError where nothing answers or the server serves other models."""
        try:
            response = self._client.get(self._url + "/models")
            served = [m["id"] for m in response.json()["data"]]
        except httpx.TransportError as error:
            raise ValueError(
                f"--endpoint {self._url}: nothing answers there ({type(error).__name__}); start "
                "the server, or give its address up to /v1"
            ) from None
        except (ValueError, KeyError, TypeError):  # not every server has this list
            return
        if self._model not in served:
            raise ValueError(
                f"--model {self._model!r}: {self._url} serves {', '.join(map(str, served))}"
            )
