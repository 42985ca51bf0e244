"""Names of cached data by content, and the lock under which they are made."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dft.data.reading import Reading
from megatron_dft.data.sources import Source
from megatron_dft.data.spec import EncoderSpec
from megatron_dft.data.tables import open_dataset
from megatron_dft.storage.files import read_json_object, sha256_of_file, write_whole

# Raise it whenever the same rows would give other tokens or masks.
VERSION = 3
# A file changed this recently may change again within its timestamp's resolution.
_SETTLED_SECONDS = 2.0


def store_parts(
    source: Source, spec: EncoderSpec, reading: Reading, cache: Path | None
) -> dict[str, Any]:
    """All that decides a source's tokens, as hashes and short values: same parts, same tokens.

    Where the files lie is no part of it, only what they hold.
    """
    if source.kind == "hub":
        content = [open_dataset(source)._fingerprint]
    else:
        content = [content_hash(Path(p), cache) for p in source.paths]
    return {
        "version": VERSION,
        "kind": source.kind,
        "content": digest(content),
        "tokenizer": digest(spec.tokenizer_json),
        "chat_template": digest(dict(spec.templates)),
        "template_args": digest(dict(spec.variables)),
        "template_date": spec.date,
        "chat_rewrites": spec.rewrites,
        "chat_drops": spec.drops,
        **reading.identity(),
    }


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def content_hash(path: Path, cache: Path | None) -> str:
    """SHA-256 of a file; remembered by name, size, inode and times of change in the cache.

    The time of modification can be set back (cp -p, touch -r), that of the inode's change cannot.
    """
    status = os.stat(path)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    identity = [str(path.resolve()), status.st_size, status.st_ino, *times]
    settled = time.time() - max(times) / 1e9 > _SETTLED_SECONDS
    note = None if cache is None else cache / "hashes" / f"{digest(identity[0])}.json"
    if note is not None and settled and note.exists():
        with contextlib.suppress(ValueError):  # a damaged note is made anew
            known = read_json_object(note)
            value = known.get("sha256")
            if known.get("identity") == identity and isinstance(value, str) and len(value) == 64:
                return value
    value = sha256_of_file(path)
    if note is not None and settled:
        with contextlib.suppress(OSError):  # it is hashed again at the next start
            write_whole(note, json.dumps({"identity": identity, "sha256": value}))
    return value


def _no_link(path: str, flags: int) -> int:
    """What a link in a lock's place leads to would be emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one process at a time makes `target`; the others wait and find it made.

    Raises ValueError where the cache directory cannot be written or has no file locks.
    """
    path = target.with_name(target.name + ".lock")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", opener=_no_link)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"--data-cache: the file system of {str(path.parent)!r} has no file locks "
                f"({error.strerror}); choose a directory on another one"
            ) from None
        _sweep(target)
        yield


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raises ValueError where a cache turns out to be read-only, full, or no directory."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--data-cache: {str(directory)!r} cannot be written: {error.strerror}; choose "
            "another directory"
        ) from None


def partial_path(target: Path) -> Path:
    """Where this process builds `target` before it is renamed."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.partial")


def _sweep(target: Path) -> None:
    """Removes what killed processes of this machine left of `target`."""
    prefix = f".{target.name}.{socket.gethostname()}."
    for path in target.parent.glob(f"{prefix}*.partial"):
        pid = path.name[len(prefix) : -len(".partial")]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
