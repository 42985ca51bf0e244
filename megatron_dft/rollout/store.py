"""A directory of samples: written line by line, flushed to the disk, healed after a kill.

settings.json              what the samples depend on; a run that differs is refused
prompts.jsonl              the prompts as they were asked, with their reference answers
samples.0-of-1.jsonl       one line a sample; one file a part (--part I/N), one writer a file
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dft.rollout.prompts import Prompt
from megatron_dft.storage.files import read_json_object, write_whole

FORMAT = 1


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; an unfinished last one is left out.

    Raises ValueError, with file and line, for a line that is no JSON object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}:{number}: damaged; delete this line and run `sample` again: it draws "
                    "what is missing"
                )
            yield record


class LineFile:
    """A file of JSON lines with one writer, healed when it is opened."""

    def __init__(self, path: Path, remedy: str = "") -> None:
        """Raises ValueError, with `remedy` at its end, where another process writes."""
        self._file: Any = open(path, "ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {path.parent}: another process writes {path.name}{remedy}"
            ) from None
        heal(self._file)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """On the disk when it returns."""
        self._file.write(json_lines(records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def agree(directory: Path, settings: Mapping[str, Any], holds: str, lines: str) -> bool:
    """Whether the directory's settings.json was there, and says the same.

    holds: what the directory is said to hold; lines: the pattern of files that need settings.

    Raises ValueError for other settings, and for lines without any.
    """
    path = directory / "settings.json"
    if not path.exists():
        if any(directory.glob(lines)):
            raise ValueError(f"--out {directory}: holds {lines} but no settings.json")
        return False
    found = read_json_object(path)
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"--out {directory}: holds {holds} with {name} {found.get(name)!r}, but now it is "
                f"{settings.get(name)!r}; give that again, or another directory"
            )
    return True


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Last of what makes a directory: with it, it is one."""
    write_whole(directory / "settings.json", json.dumps(settings, indent=1) + "\n")


class SampleStore:
    """One writer's view of a sample directory."""

    def __init__(self, directory: Path, part: int = 0, parts: int = 1) -> None:
        self.directory = directory
        self._path = directory / f"samples.{part}-of-{parts}.jsonl"
        self._file: LineFile | None = None

    def open(self, settings: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        """Make the directory or take it up again.

        Raises ValueError where it holds samples of other settings, or another process writes.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        settings = {"format": FORMAT, **settings}
        # Parts of one job start together: the first makes the directory, the others find it made.
        with open(self.directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not agree(self.directory, settings, "samples", "samples.*.jsonl"):
                lines = json_lines(p.record() for p in prompts)
                write_whole(self.directory / "prompts.jsonl", lines)
                write_settings(self.directory, settings)
        self._file = LineFile(self._path, "; wait for it, or give each its own --part I/N")

    def done(self) -> set[tuple[int, int]]:
        """(prompt, sample) of every stored sample, this part's and the others'."""
        return {(r["prompt"], r["sample"]) for r in read_samples(self.directory)}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """On the disk when it returns."""
        assert self._file is not None
        self._file.append(records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def heal(file: Any) -> None:
    """Cut off what a killed writer left of its last line."""
    file.seek(0, os.SEEK_END)
    size = end = file.tell()
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        file.truncate(end)
        os.fsync(file.fileno())


def read_settings(directory: Path) -> dict[str, Any]:
    """Raises ValueError where `directory` is no sample directory."""
    path = directory / "settings.json"
    if not path.exists():
        raise ValueError(f"{directory}: expected a directory that `megatron-dft sample` wrote")
    return json.loads(path.read_text(encoding="utf-8"))


def read_stored_prompts(directory: Path) -> list[Prompt]:
    lines = read_lines(directory / "prompts.jsonl")
    return [Prompt(r["prompt"], r["messages"], r["answer"], r["where"]) for r in lines]


def read_samples(directory: Path) -> list[dict[str, Any]]:
    """Every stored sample once, ordered by prompt and sample number."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(directory.glob("samples.*.jsonl")):
        for record in read_lines(path):
            found.setdefault((record["prompt"], record["sample"]), record)
    return [found[key] for key in sorted(found)]
