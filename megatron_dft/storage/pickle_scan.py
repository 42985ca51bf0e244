"""A pickle read over without building anything: whether its instructions are whole, and its memo no
larger than it.

Python's fast unpickler keeps what a pickle numbers in an array as long as the largest number: nine
bytes, "put this at 2**28", cost 4 GB and 20 s. Here the numbers are compared with the place where
they stand: each object takes a byte of the file at least.
"""

import pickle
import pickletools
import re

_SIZES = {op.code.encode("latin-1"): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_PUTS = (pickle.PUT, pickle.LONG_BINPUT)
# Bytes of the length that an instruction's argument begins with, as pickletools marks them.
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_TWO_LINES = (pickle.GLOBAL, pickle.INST)


def _run_of_plain() -> re.Pattern[bytes]:
    """As many instructions of a fixed size as there are in a row, but the last, up to 4,096."""
    kinds = []
    for size in sorted({n for n in _SIZES.values() if n >= 0}):
        codes = [c for c, n in _SIZES.items() if n == size and c not in (pickle.STOP, *_PUTS)]
        kinds.append(b"[" + b"".join(map(re.escape, codes)) + b"]" + b"." * size)
    return re.compile(b"(?:" + b"|".join(kinds) + b"){1,4096}", re.DOTALL)


_PLAIN = _run_of_plain()


def check(content: bytes) -> None:
    """Raises ValueError (the reason alone) where the first pickle of `content` is none that a
    writer makes: an unknown instruction, one that is cut off, a number beyond its place."""
    at = 0
    while True:
        plain = _PLAIN.match(content, at)
        at = plain.end() if plain else at
        code = content[at : at + 1]
        if code == pickle.STOP:
            return
        size = _SIZES.get(code)
        if size is None:
            raise ValueError("it is cut off" if not code else f"it is no pickle at byte {at}")
        end = _end(content, at + 1, code, size)
        if end > len(content):
            raise ValueError("it is cut off")
        if code in _PUTS and not _number(code, content[at + 1 : end]) <= at:
            raise ValueError(f"it numbers an object at byte {at} beyond all that can be there")
        at = end


def _end(content: bytes, at: int, code: bytes, size: int) -> int:
    """The place behind an argument that begins at `at`."""
    if size >= 0:
        return at + size
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if code in _TWO_LINES else 1):
            at = content.find(b"\n", at) + 1 or len(content) + 1
        return at
    length = _LENGTHS[size]
    return at + length + int.from_bytes(content[at : at + length], "little")


def _number(code: bytes, argument: bytes) -> int:
    if code == pickle.LONG_BINPUT:
        return int.from_bytes(argument, "little")
    return int(argument)
