"""A tokenizer's own rules cannot take all time and memory, and its failures are a line."""

import dataclasses
import json

import pytest

from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer
from tests.data.fixtures import chat, chatml_tokenizer
from tests.data.masks import encode


def encoder(**parts):
    spec = encoder_spec(chatml_tokenizer())
    layout = json.loads(spec.tokenizer_json) | parts
    return ChatEncoder(dataclasses.replace(spec, tokenizer_json=json.dumps(layout)))


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*rules, inner="normalizers"):
    return {"type": "Sequence", inner: list(rules)}


DOUBLED = replace("aa", String="a")
GROWING = {
    "rule by rule": sequence(*[DOUBLED] * 40),
    "one in the other": sequence(sequence(*[DOUBLED] * 6), sequence(*[DOUBLED] * 6)),
    "at nothing": replace("x" * 100_000, Regex=""),
    "in front": {"type": "Prepend", "prepend": "x" * 100_000_000},
    "in front, then doubled": sequence({"type": "Prepend", "prepend": "x" * 999}, *[DOUBLED] * 6),
}


@pytest.mark.parametrize("kind", GROWING)
def test_rules_that_make_texts_grow_are_refused(kind):
    with pytest.raises(ValueError, match="^the tokenizer's normalizer makes texts up to .* longer"):
        encoder(normalizer=GROWING[kind])


def test_they_are_refused_before_the_library_meets_them(tmp_path):
    chatml_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"normalizer": GROWING["at nothing"]})
    )
    with pytest.raises(ValueError, match="^the tokenizer's normalizer makes texts"):
        load_tokenizer(tmp_path)


def test_so_are_those_of_a_decoder():
    rules = sequence(*[DOUBLED] * 40, inner="decoders")
    with pytest.raises(ValueError, match="^the tokenizer's decoder makes texts"):
        encoder(decoder=rules)


def test_rules_of_real_tokenizers_are_taken():
    rules = [{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}, replace("▁", String=" "),
             replace(" ", Regex=" {2,}")]  # fmt: skip
    assert encoder(normalizer=sequence(*rules))


def test_what_the_library_cannot_encode_is_one_line():
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}
    bytes_alone = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    broken = encoder(model=words, pre_tokenizer={"type": "ByteLevel", **bytes_alone})
    with pytest.raises(ValueError, match="^the tokenizer fails on the data: .*tokenizer.json$"):
        encode(broken, {"messages": chat("a", "b")})
