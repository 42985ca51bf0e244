"""Whole files: written in one step, hashed, read as JSON. No torch: data workers import it."""

import contextlib
import hashlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PART = ".part"  # how the name of a file that is being written ends


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, also after a power cut.

    Its directory is made. Where the block raises, `path` keeps what it held; the mode of a file
    that was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # On a shared file system two nodes may have processes of the same number.
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there with all of `content` (text as UTF-8) or not at all."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Bring what a file, or a directory's list of names, holds to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of the file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: one line naming the file, where it cannot be read or is no JSON (NaN and
            Infinity, which Python's writer makes, are taken).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # Deep nesting is a RecursionError.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not JSON ({reason}); fetch or copy it again") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`, where anything but a JSON object is a ValueError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected a JSON object")
    return value
