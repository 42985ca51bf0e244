"""Masks what is secret in a command line before it is written anywhere.

A key is known by the flag or variable that it is given to, by the place of a password in a URL, or
by the shape that the great services give to theirs.
"""

import re
import shlex
from collections.abc import Iterable

MASK = "***"

# The last word of a flag's or a variable's name. `tokens`, `tokenizer-model` and `json-keys` are no
# such names.
_NAME = re.compile(
    r"(^|[-_.])(key|api[-_]?key|apikey|token|pat|secret|password|passwd|passphrase|pass|pwd|"
    r"credentials?|auth|authorization|bearer|jwt|cookie|dsn)$",
    re.IGNORECASE,
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])([^=&\s]*(?:key|token|secret|signature|sig|password|credential)[^=&\s]*=)[^&\s]+",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{12,}"
    r"|wandb_v1_\w{16,}|nvapi-[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)


_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)", re.DOTALL)
# As argparse spells them; a key may begin with dashes too.
_FLAG = re.compile(r"--[a-z][a-z0-9_-]*(=.*)?", re.DOTALL)


def masked_text(text: str) -> str:
    """`text` without the passwords of its URLs and without keys of a known shape."""
    text = _PEM.sub(MASK, text)
    text = _USER_IN_URL.sub(MASK, text)
    text = _IN_QUERY.sub(rf"\1{MASK}", text)
    return _SHAPES.sub(MASK, text)


def masked(words: Iterable[str]) -> list[str]:
    """The words of a command line, secrets replaced by `MASK`."""
    found, secret_follows = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if secret_follows and not _FLAG.fullmatch(word):
            # The rest of its line of values too: nobody knows how many the flag takes.
            found.append(MASK)
            continue
        secret_follows = False
        if equals and value and _NAME.search(name):
            found.append(f"{name}={MASK}")
            continue
        secret_follows = word.startswith("--") and not equals and bool(_NAME.search(word))
        found.append(masked_text(word))
    return found


def masked_line(words: Iterable[str]) -> str:
    """The command line as a shell takes it, in one line but for what its words hold."""
    return " ".join(shlex.quote(word).replace(f"'{MASK}'", MASK) for word in masked(words))
