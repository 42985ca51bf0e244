"""Whether a cached store's files still hold what was written: hashed once on each node.

A file is hashed again only where its size, inode or times of change differ from those that this
node last found right; so a start costs four stat calls, and a changed byte is noticed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dft.storage.files import read_json, sha256_of_file, write_whole


def check_files(directory: Path, hashes: Mapping[str, str]) -> None:
    """Raises ValueError, naming the file, where one of `hashes` (name → SHA-256) is another."""
    current = _identity(directory, hashes)
    note = _note(directory)
    with contextlib.suppress(ValueError):  # none, or a damaged one
        if read_json(note) == current:
            return
    for name, expected in hashes.items():
        if sha256_of_file(directory / name) != expected:
            raise ValueError(
                f"the data cache {str(directory)!r} is damaged: {name} does not have the content "
                "that was written; delete the directory and start again"
            )
    remember(directory, hashes)


def remember(directory: Path, hashes: Mapping[str, str]) -> None:
    """Notes that this node found the files right; a cache that cannot be written is hashed again
    at the next start."""
    with contextlib.suppress(OSError):
        write_whole(_note(directory), json.dumps(_identity(directory, hashes)))


def _note(directory: Path) -> Path:
    return directory.parent / "verified" / f"{directory.name}.{socket.gethostname()}.json"


def _identity(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in sorted(names):
        status = os.stat(directory / name)
        found[name] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return found
