"""The OpenAI-compatible protocol of one answer: the request, and what a response comes to.

https://platform.openai.com/docs/api-reference/chat; vLLM, SGLang and llama.cpp serve it too.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_dft.rollout.chat import raw_text
from megatron_dft.rollout.draws import Answer, BackendGone, Decoding, Draw, Fault

_TRY_AGAIN = {408, 409, 425, 429}


def request(draw: Draw, model: str, how: Decoding, raw: bool) -> tuple[str, dict[str, Any]]:
    """The path after `/v1` and the JSON body; raw asks for a completion of the prompt's text."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "max_tokens": how.max_tokens,
        "seed": draw.seed,
        "n": 1,
    }
    if how.stop:
        body["stop"] = list(how.stop)
    if raw:
        return "/completions", {**body, "prompt": raw_text(draw.prompt.messages)}
    return "/chat/completions", {**body, "messages": draw.prompt.messages}


def read(status: int, content: bytes, raw: bool) -> tuple[Answer | Fault, bool]:
    """The answer or its fault, and whether asking again may help."""
    if status != 200:
        return Fault(f"answer refused with HTTP {status}"), status >= 500 or status in _TRY_AGAIN
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["text"] if raw else choice["message"]["content"]
        finish = choice.get("finish_reason")
        tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Fault("response that is no completion"), True
    if not raw and choice["message"].get("reasoning_content"):
        raise BackendGone(
            "--endpoint: the server takes the reasoning out of the answers; start it without its "
            "reasoning parser, so that it can be trained on"
        )
    if not isinstance(text, str):
        return Fault("response without text"), True
    if finish is None:
        return Fault("answer that broke off"), True
    if finish not in ("stop", "length"):
        return Fault(f"answer that ended with {str(finish)[:40]!r}"), False
    return Answer(text, tokens, finish), False
