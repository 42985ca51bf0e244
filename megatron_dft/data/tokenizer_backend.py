"""Holds a loaded tokenizer to its own tokenizer.json: same text, same ids.

transformers rebuilds some tokenizers after their class rather than after their file; 5.3 to 5.21
give a byte-level one whose class says Llama (DeepSeek's, R1's distillations) sentencepiece's
handling of spaces, and every space of every text is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Spaces, runs of them, line ends, digits, other scripts: what a wrong pre-tokenizer gets wrong.
_PROBES = (
    "Add one and two.",
    "def f(n):\n    return n + 1\n\n",
    "x = 1234567 - 3.5",
    "naïve “quotes” 数学 и 🙂",
    "two  spaces,\ta tab",
)


def check_backend(tokenizer: Any, directory: Path) -> None:
    """Raises ValueError where `tokenizer`, loaded from `directory`, gives other ids than its file.

    A leading space alone may differ: tokenizer_config.json may rightly ask for it. Directories
    without a tokenizer.json (and hub names) are not compared.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    try:
        original = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever it meets
        raise ValueError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from None
    no_dropout(original)
    for probe in _PROBES:
        expected = original.encode(probe, add_special_tokens=False).ids
        given = tokenizer.backend_tokenizer.encode(probe, add_special_tokens=False).ids
        if given != expected and not _differ_at_the_start(original, given, expected):
            raise ValueError(
                f"{path}: transformers {_version()} loads it as {type(tokenizer).__name__}, which "
                f"tokenises {probe!r} as {given[:8]}… where the file gives {expected[:8]}…; take "
                "transformers 5.22 or later, or set tokenizer_class to PreTrainedTokenizerFast in "
                "tokenizer_config.json"
            )


def no_dropout(backend: Any) -> None:
    """Ends BPE's dropout, which a file may hold: the same text would be other ids each time."""
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def _differ_at_the_start(original: Any, given: list[int], expected: list[int]) -> bool:
    """Whether both spell the same text but for one space before it, and end alike."""
    texts = [original.decode(ids, skip_special_tokens=False) for ids in (given, expected)]
    half = len(expected) // 2
    return texts[0].removeprefix(" ") == texts[1].removeprefix(" ") and (
        given[-half:] == expected[-half:]
    )


def _version() -> str:
    import transformers

    return transformers.__version__
