"""Small files that are tokenised into a cache, and what two stores have to agree on."""

import numpy as np

from megatron_dft.data import prepare
from megatron_dft.data.sources import parse_sources
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.fixtures import chat


def some_rows(count):
    return [
        {"messages": chat(f"question {i}?", f"answer {i} " * (1 + i % 5))} for i in range(count)
    ]


def prepared(paths, tokenizer, cache_dir, **options):
    spec = encoder_spec(tokenizer)
    return prepare.prepare(
        parse_sources(paths), spec, prepare.PrepareOptions(cache_dir=cache_dir, **options)
    )


def same_store(a, b):
    return all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "offsets", "rows", "files")
    )
