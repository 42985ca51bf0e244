"""What a committed checkpoint directory holds: sizes and SHA-256 of its files, and whose run it is.

The manifest is written last, so a directory without one was never finished. Each rank hashes the
files that it wrote, and on loading each rank verifies its share: a checkpoint of a terabyte is read
by all nodes at once and not by one process. Megatron's own --verify-integrity has one rank hash
everything.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_dft.storage.files import PART, flush, read_json_object, sha256_of_file, write_whole
from megatron_dft.storage.torch_dist import TRACKER as TRACKER
from megatron_dft.storage.torch_dist import iteration_directory as iteration_directory

FILE_NAME = "megatron_dft.json"
HASHES = ".megatron_dft_hashes_"  # and a rank; written_hashes.py
_AT_ONCE = 4  # files
_ITERATION = re.compile(r"iter_(\d{7,})$")
_WRITTEN_BY = re.compile(r"__(\d+)_")
# torch_dist's index is a pickle; the names of its files stand in it as they are, so that nothing
# needs to be built of it.
_INDEX, _SHARD = ".metadata", re.compile(rb"__\d+_\d+\.distcp")


def iterations(root: Path) -> list[int]:
    """Steps that have a directory, whole or not, ascending."""
    if not root.is_dir():
        return []
    found = [_ITERATION.match(path.name) for path in root.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def _digest(path: Path) -> dict[str, Any]:
    flush(path)  # what the manifest vouches for has to be on the disk before it
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def files_of(directory: Path, rank: int, world_size: int) -> list[Path]:
    """The files that `rank` answers for.

    torch_dist names a file after the rank that wrote it, whose page cache still holds it; rank 0
    takes the files without such a name. What is being written and the writers' hashes are nobody's.
    """
    mine = []
    for path in sorted(directory.rglob("*")):
        match = _WRITTEN_BY.match(path.name)
        writer = int(match[1]) % world_size if match else 0
        passing = path.name.endswith(PART) or path.name.startswith(HASHES)
        if writer == rank and not passing and path.name != FILE_NAME and path.is_file():
            mine.append(path)
    return mine


def describe(
    directory: Path, files: Sequence[Path], known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """name → bytes and sha256 of `files`. known: those that their writer has told."""
    known = known or {}
    # At once: training waits for them, and neither fsync nor SHA-256 holds the interpreter.
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        names = [str(path.relative_to(directory)) for path in files]
        found = threads.map(lambda n, p: known.get(n) or _digest(p), names, files)
        return dict(zip(names, found, strict=True))


def named_files(directory: Path) -> set[str]:
    """The data files that the checkpoint's own index names; none where there is no index."""
    try:
        return {name.decode() for name in _SHARD.findall((directory / _INDEX).read_bytes())}
    except FileNotFoundError:
        return set()


def unaccounted(directory: Path, files: Iterable[str]) -> list[str]:
    """What the checkpoint's own index names and `files` lacks."""
    return sorted(named_files(directory) - set(files))


def write(directory: Path, files: dict[str, dict[str, Any]], run: dict[str, Any]) -> None:
    """Commit the directory."""
    content = {"version": 1, "files": dict(sorted(files.items())), "run": run}
    write_whole(directory / FILE_NAME, json.dumps(content, indent=1) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none.

    Raises ValueError where it is not readable.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        content = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{FILE_NAME} is not readable ({error})") from None
    files, run = content.get("files"), content.get("run")
    if not isinstance(files, dict) or not all(map(_is_record, files.items())):
        raise ValueError(f"{FILE_NAME} has no list of files")
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise ValueError(f"{FILE_NAME} does not say which run it is of")
    return content


def _is_record(named: tuple[str, Any]) -> bool:
    """Whether an entry is a file of the directory with its size and SHA-256."""
    name, record = named
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    told = isinstance(record, dict) and type(record.get("bytes")) is int
    return inside and told and isinstance(record.get("sha256"), str)


def problems(directory: Path, content: dict[str, Any], rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's share of the files, in words; empty where nothing is."""
    found = []
    for name in sorted(content["files"])[rank::world_size]:
        path, expected = directory / name, content["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                found.append(f"{name} has {size} bytes, not {expected['bytes']}")
                continue
            if sha256_of_file(path) != expected["sha256"]:
                found.append(f"{name} does not have its checksum")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name}: {error}")
    return found


def remove(directory: Path) -> None:
    """Delete a checkpoint directory; one that is half deleted does not count as whole."""
    (directory / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory)
