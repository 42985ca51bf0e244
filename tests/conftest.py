"""Process-wide settings, which must precede the first torch import, and what every room shares."""

import os

import pytest

from tests.chats import write_chats

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# oneDNN takes AMX instructions that some virtual machines announce and do not have.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny random Llama with a byte tokenizer."""
    from tests.hf.tiny import make_tiny

    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", vocab_size=259)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # The ranks inherit it: nothing of the tests goes to the user's cache.
        patch.setenv("MEGATRON_DFT_DATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
