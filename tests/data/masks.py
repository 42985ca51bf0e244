"""Conversations and the masks that templates and TRL give them."""

import numpy as np
from hypothesis import strategies as st

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec
from tests.data.families import FAMILIES
from tests.data.fixtures import (
    CHATML_SPECIALS,
    CHATML_TEMPLATE,
    byte_level_tokenizer,
)

ENCODERS: dict[str, tuple] = {}


def _encoder(name):
    if name not in ENCODERS:
        tokenizer = FAMILIES[name].tokenizer()
        ENCODERS[name] = tokenizer, ChatEncoder(encoder_spec(tokenizer))
    return ENCODERS[name]


def encode(encoder, row):
    return encoder.encode(encoder.render(parse_row(row, None)))


def byte_lengths(tokenizer, ids):
    """Bytes that each token stands for, from the byte-level vocabulary itself."""
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [len(t.encode()) if t in special else len(t) for t in tokens]


def assert_trains_exactly(tokenizer, flagged, pieces):
    """`flagged` is the text of the pieces up to the last one that trains, and trains just those."""
    while not pieces[-1][1]:
        pieces = pieces[:-1]
    ids = (flagged & ID_MASK).astype(np.int64)
    text = "".join(t for t, _ in pieces)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    trains = np.concatenate([np.full(len(t.encode()), trained) for t, trained in pieces])
    at = 0
    for token, length in enumerate(byte_lengths(tokenizer, ids)):
        want = set(trains[at : at + length].tolist())
        assert want == {bool(flagged[token] & SUPERVISED)}, (token, text.encode()[at : at + length])
        at += length
    assert at == len(text.encode())


def assert_conversation(name, messages, **row):
    family = FAMILIES[name]
    tokenizer, encoder = _encoder(name)
    got = encode(encoder, {"messages": messages, **row})
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if family.rewrites and len(got) > 1:
        assert len(got) == len(turns)
        for flagged, turn in zip(got, turns, strict=True):
            assert_trains_exactly(tokenizer, flagged, family.pieces(messages[: turn + 1]))
    else:
        assert len(got) == 1
        assert_trains_exactly(tokenizer, got[0], family.pieces(messages))
    return got


SAFE = st.text(
    st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0<[|"),
    min_size=1,
    max_size=30,
).filter(lambda t: t.strip())


SPACED = st.tuples(
    st.sampled_from(["", " ", "\n", "\n\n", "\t"]), SAFE, st.sampled_from(["", "\n"])
)


MARKED = CHATML_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


def _marked(template=MARKED):
    tokenizer = byte_level_tokenizer(template, CHATML_SPECIALS, eos="<|im_end|>")
    return tokenizer, ChatEncoder(encoder_spec(tokenizer))
