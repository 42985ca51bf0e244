"""A sentencepiece `.model` file as a transformers fast tokenizer with the same ids.

Exact masks need character offsets, which sentencepiece's own encoder does not give for a text with
control tokens in it; so the model's pieces move into the `tokenizers` library, and the result is
held to sentencepiece's own encoding before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"

# Texts that tell a faulty conversion: runs of spaces, digits, scripts, bytes that no piece covers.
_PROBES = (
    "Hello world, this  is\ta test.\nNew line\n\nand another",
    "3.14159 + 2,718 = ?",
    "naïve façade — “quotes” … ﬁne",
    "数学と日本語 и кириллица",
    "emoji 🙂 and \U0001f9ec",
    "def f(x):\n    return x**2",
    "trailing ",
)


def load_sentencepiece(path: Path) -> Any:
    """A PreTrainedTokenizerFast with the ids of the sentencepiece model at `path`.

    Control symbols become special tokens, user-defined symbols added ones. A dummy prefix is put
    before the first character of a text only, not behind each control token. Raises ValueError for
    what is no such model, and where the conversion does not tokenise as sentencepiece does.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    if not path.is_file():
        raise ValueError(f"tokenizer {str(path)!r} does not exist")
    try:
        original = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"tokenizer {str(path)!r} is not a sentencepiece model: {str(error).splitlines()[0]}"
        ) from None
    messages: Any = sentencepiece_model_pb2  # generated code, which mypy cannot see into
    proto = messages.ModelProto.FromString(original.serialized_model_proto())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_convert(proto, path),
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": proto.pieces[index].piece
            for name in ("bos", "eos", "unk", "pad")
            if (index := getattr(original, f"{name}_id")()) >= 0
        },
    )
    for probe in _PROBES:
        expected, got = original.encode(probe), tokenizer.encode(probe, add_special_tokens=False)
        if expected != got:
            raise ValueError(
                f"sentencepiece model {str(path)!r}: its conversion tokenises {probe!r} as {got} "
                f"where sentencepiece gives {expected}; convert it to tokenizer.json with its own "
                "transformers class and give that directory"
            )
    return tokenizer


def _convert(proto: Any, path: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE, Unigram

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise ValueError(
            f"sentencepiece model {str(path)!r} is neither unigram nor BPE with spaces before "
            "words; convert it to tokenizer.json and give that directory"
        )
    if trainer.model_type == _UNIGRAM:
        scored = [(p.piece, p.score) for p in proto.pieces]
        model: Any = Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    else:
        vocabulary = {p.piece: i for i, p in enumerate(proto.pieces)}
        model = BPE(
            vocabulary,
            _merges(proto),
            unk_token=proto.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    backend = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "first" if rules.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    for kind, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        add([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == kind])
    if trainer.bos_id >= 0:
        # A text of its own begins with bos, as in Llama, Mistral and Gemma.
        bos = proto.pieces[trainer.bos_id].piece
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, trainer.bos_id)]
        )
    return backend


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way in which two pieces make a third, best third first: sentencepiece's own order."""
    normal = {p.piece: p.score for p in proto.pieces if p.type == 1}
    found = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-score, -normal[left], -normal[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
