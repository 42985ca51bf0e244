"""A tiny random Llama and a small chat data set with answers of very different lengths."""

import json
import random

import pytest

from tests.hf.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=259)


def write_chats(path, rows=48, seed=0, longest=24):
    """Conversations whose supervised share runs from one token to most of the row."""
    draw = random.Random(seed)
    words = ["sum", "two", "seven", "is", "and", "then", "x"]
    with open(path, "w") as file:
        for _ in range(rows):
            question = " ".join(draw.choices(words, k=draw.randint(1, 2)))
            answer = " ".join(draw.choices(words, k=draw.randint(1, 4)))[: draw.randint(1, longest)]
            turns = [("user", question), ("assistant", answer.strip() or "x")]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # The ranks inherit it: nothing of the tests goes to the user's cache.
        patch.setenv("MEGATRON_DFT_DATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
