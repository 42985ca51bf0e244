"""Sentencepiece models: the ids of sentencepiece itself, and exact masks with a template file."""

import random

import pytest
import sentencepiece

from megatron_dft.data import sentencepiece_model
from megatron_dft.data.encode import ChatEncoder
from megatron_dft.data.schema import parse_row
from megatron_dft.data.spec import ID_MASK, SUPERVISED
from megatron_dft.data.tokenizer import encoder_spec, load_tokenizer
from tests.data.families import FAMILIES
from tests.data.fixtures import chat


def _corpus():
    rng = random.Random(0)
    parts = ["ing", "ed", "the", "on", "er", "al", "re", "st", "ca", "lo", "mi", "nu", "po"]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(800)]
    return [*lines, "Hello world, this is a test: 3.14159 + 2,718 = ?", "def f(x):    return x**2"]


KINDS = {
    "llama": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False, split_digits=True),
    "gemma": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False, add_dummy_prefix=False),
    "t5": dict(model_type="unigram"),
    "unigram bytes": dict(model_type="unigram", byte_fallback=True, add_dummy_prefix=False,
                          normalization_rule_name="identity", remove_extra_whitespaces=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spm")
    for name, options in KINDS.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_corpus()),
            model_prefix=str(directory / name),
            vocab_size=600,
            hard_vocab_limit=False,
            character_coverage=1.0,
            control_symbols=["<start_of_turn>", "<end_of_turn>"],
            user_defined_symbols=["<think>"],
            minloglevel=2,
            **options,
        )
    (directory / "gemma.jinja").write_text(FAMILIES["gemma"].template.replace("bos_token", "'<s>'"))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces_own(models, kind):
    tokenizer = load_tokenizer(models / f"{kind}.model", models / "gemma.jinja")
    original = sentencepiece.SentencePieceProcessor(model_file=str(models / f"{kind}.model"))
    rng = random.Random(1)
    pool = "abcdeilnoprst   \n0123456789.,é数🙂_-"
    for _ in range(300):
        text = rng.choice("aeinorst") + "".join(rng.choices(pool, k=rng.randint(0, 40)))
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text), text
    assert tokenizer.encode("a<think>b", add_special_tokens=False) == original.encode("a<think>b")
    assert tokenizer.bos_token_id == original.bos_id()
    assert tokenizer.eos_token_id == original.eos_id()
    assert len(tokenizer) == original.vocab_size()
    end = original.piece_to_id("<end_of_turn>")
    assert tokenizer.encode("<end_of_turn>", add_special_tokens=False) == [end]


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram bytes"])
def test_masks_are_exact(models, kind):
    tokenizer = load_tokenizer(models / f"{kind}.model", models / "gemma.jinja")
    encoder = ChatEncoder(encoder_spec(tokenizer))
    messages = chat("Hello world", "this is 数\n\na test", "more?", "the end 🙂")
    (flagged,) = encoder.encode(encoder.render(parse_row({"messages": messages}, None)))
    ids, trained = flagged & ID_MASK, (flagged & SUPERVISED) != 0
    first = tokenizer.decode(ids[trained], skip_special_tokens=False)
    assert first == "this is 数\n\na test<end_of_turn>the end 🙂<end_of_turn>"
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False)[: len(ids)] == ids.tolist()


def test_a_token_that_joins_header_and_answer_stays_out(models, tmp_path):
    """Where a piece crosses the border, half of it is the header's: it must not train."""
    tokenizer = load_tokenizer(models / "gemma.model", models / "gemma.jinja")
    # A header that ends in the middle of a word: "…st" + "ed" is one piece or several.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' + m.role + ' st' + m.content }}"
        "{{ '<end_of_turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant st' }}{% endif %}"
    )
    encoder = ChatEncoder(encoder_spec(tokenizer))
    (flagged,) = encoder.encode(
        encoder.render(parse_row({"messages": chat("er", "ed and more")}, None))
    )
    ids, trained = flagged & ID_MASK, (flagged & SUPERVISED) != 0
    pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
    first = pieces[int(trained.argmax())]
    before = pieces[int(trained.argmax()) - 1]
    assert "st" in before and before.strip("▁") != "st", "the fixture must make them join"
    assert not first.startswith("st")
    assert tokenizer.decode(ids[trained]).endswith("more<end_of_turn>")


def test_a_conversion_that_differs_is_refused(models, monkeypatch):
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda proto: [])
    with pytest.raises(ValueError, match="llama.model': its conversion tokenises 'Hello world"):
        load_tokenizer(models / "llama.model", models / "gemma.jinja")


def test_what_is_no_model_or_has_no_template_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="nothere.model' does not exist"):
        load_tokenizer(tmp_path / "nothere.model")
    (tmp_path / "bad.model").write_text("hello")
    with pytest.raises(ValueError, match="bad.model' is not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="has no chat template; give one with --chat-template"):
        load_tokenizer(models / "llama.model")
    with pytest.raises(ValueError, match="--chat-template .* cannot be read"):
        load_tokenizer(models / "llama.model", tmp_path / "nothere.jinja")
