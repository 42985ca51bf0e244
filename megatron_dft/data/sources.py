"""What `--train-data` names: files, directories and hub data sets, with their weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_WEIGHTED = re.compile(r"^([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?):(.+)$")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.\[\]:%-]+)?$")
JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Source:
    """One item of --train-data.

    kind: "files" (JSON lines or Parquet, see `paths`), "saved" (a directory that `datasets` wrote)
    or "hub" (a name, `org/name` or `org/name@split`). weight: None where none was given.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    weight: float | None


def parse_sources(
    items: Sequence[str | os.PathLike[str]], flag: str = "--train-data"
) -> list[Source]:
    """`["a.jsonl", "b.parquet"]` or `["0.7:a.jsonl", "0.3:b.parquet"]` to sources.

    Raises ValueError for a path that does not exist, an unknown kind of file, weights on some items
    only, or weights that are not positive.
    """
    if isinstance(items, str | os.PathLike):
        items = [items]
    if not items:
        raise ValueError(f"{flag} names no data; give at least one file")
    sources = [_parse(os.fspath(item), flag) for item in items]
    weighted = [s for s in sources if s.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(s.name for s in sources if s.weight is None)
        raise ValueError(
            f"{flag}: {weighted[0].name!r} has a weight and {bare!r} has none; give every item a "
            "weight (0.7:a.jsonl 0.3:b.parquet) or none"
        )
    return sources


def _parse(item: str, flag: str) -> Source:
    weight, name = None, item
    match = _WEIGHTED.match(item)
    if match and not os.path.exists(item):
        weight, name = float(match.group(1)), match.group(2)
        if not weight > 0:
            raise ValueError(
                f"{flag} {item!r}: the weight must be above 0; leave the item out instead"
            )
    path = Path(name)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return Source(name, "saved", _files_below(path, None), weight)
        files = _files_below(path, JSON_LINES + PARQUET)
        if not files:
            raise ValueError(
                f"{flag} {name!r} is a directory without .jsonl or .parquet files and not a data "
                "set that `datasets` saved; name the files"
            )
        return Source(name, "files", files, weight)
    if path.exists():
        if not name.endswith(JSON_LINES + PARQUET):
            raise ValueError(
                f"{flag} {name!r}: unknown kind of file; expected {', '.join(JSON_LINES + PARQUET)}"
            )
        return Source(name, "files", (name,), weight)
    if _HUB_NAME.match(name) and not name.endswith(JSON_LINES + PARQUET):
        return Source(name, "hub", (), weight)
    raise ValueError(f"{flag} {name!r} does not exist; give a file, a directory or a hub data set")


def _files_below(directory: Path, suffixes: tuple[str, ...] | None) -> tuple[str, ...]:
    found = (p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("."))
    return tuple(sorted(str(p) for p in found if suffixes is None or p.name.endswith(suffixes)))
