"""What `--train-data` names: files, directories and hub data sets, with their weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_SETTING = rf"(?:{_NUMBER}|(?:share|cap|epochs)=[^,:]*)"
_WEIGHTED = re.compile(rf"^({_SETTING}(?:,{_SETTING})*):(.+)$")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.\[\]:%-]+)?$")
JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet", ".pq")
CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
FILES = JSON_LINES + PARQUET + CSV
# How `datasets` tells splits by the names of files and directories (its data_files.py).
_SPLITS = {
    split: re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?=[-._ 0-9/]|$)")
    for split, words in (
        ("train", "train|training"),
        ("validation", "validation|valid|dev|val"),
        ("test", "test|testing|eval|evaluation"),
    )
}


@dataclass(frozen=True)
class Source:
    """One item of --train-data.

    kind: "files" (JSON lines, Parquet or CSV, see `paths`), "saved" (a directory that `datasets`
    wrote) or "hub" (a name, `org/name` or `org/name@split`). weight: its share of an epoch,
    relative to the others'; cap: at most so many of its conversations an epoch; epochs: how often
    an epoch takes each of them. None where none was given.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    weight: float | None
    cap: int | None = None
    epochs: float | None = None


def parse_sources(
    items: Sequence[str | os.PathLike[str]], flag: str = "--train-data"
) -> list[Source]:
    """`["a.jsonl", "b.parquet"]` or `["0.7:a.jsonl", "0.3:b.parquet"]` to sources.

    Before the colon stand, separated by commas, a share (`0.7` or `share=0.7`), `cap=1000` and
    `epochs=2`. Raises ValueError for a path that does not exist, an unknown kind of file, shares on
    some items only or beside epochs, and numbers that are not positive.
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
    repeated = next((s for s in sources if s.epochs is not None), None)
    if weighted and repeated is not None:
        raise ValueError(
            f"{flag}: {repeated.name!r} has epochs={repeated.epochs:g} beside shares, and both say "
            "how many conversations it gives; keep the shares or the epochs"
        )
    return sources


def _parse(item: str, flag: str) -> Source:
    name = item
    settings: dict[str, float] = {}
    match = _WEIGHTED.match(item)
    if match and not os.path.exists(item):
        settings, name = _settings(match.group(1), item, flag), match.group(2)
    cap = settings.get("cap")
    kind, paths = _files_of(name, flag)
    return Source(
        name,
        kind,
        paths,
        settings.get("share"),
        None if cap is None else int(cap),
        settings.get("epochs"),
    )


def _settings(text: str, item: str, flag: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.rpartition("=")
        key = key or "share"
        if key in found:
            raise ValueError(f"{flag} {item!r}: {key} is given twice")
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = math.nan
        name = "the weight" if key == "share" else key
        if not 0 < found[key] < math.inf:
            raise ValueError(f"{flag} {item!r}: {name} must be above 0; leave the item out instead")
        if key == "cap" and found[key] != int(found[key]):
            raise ValueError(f"{flag} {item!r}: cap counts conversations; give a whole number")
    return found


def _files_of(name: str, flag: str) -> tuple[str, tuple[str, ...]]:
    """The kind of an item and its files."""
    path = Path(name)
    held_out = flag == "--valid-data"  # elsewhere the split "train" is meant where none is named
    if path.is_dir():
        if held_out and (path / "dataset_dict.json").exists():
            raise ValueError(
                f"{flag} {name!r} holds several splits; name the directory of one, such as "
                f"{path / 'validation'}"
            )
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return "saved", _files_below(path, None)
        files = _files_below(path, FILES)
        if not files:
            raise ValueError(
                f"{flag} {name!r} is a directory without .jsonl, .parquet or .csv files and not a "
                "data set that `datasets` saved; name the files"
            )
        _check_one_split(path, files, flag)
        return "files", files
    if path.exists():
        if not name.endswith(FILES):
            raise ValueError(f"{flag} {name!r}: unknown kind of file; expected {', '.join(FILES)}")
        return "files", (name,)
    if _HUB_NAME.match(name) and not name.endswith(FILES):
        if held_out and "@" not in name:
            raise ValueError(
                f"{flag} {name!r}: a hub data set without a split would be its 'train'; name the "
                f"one to evaluate on, such as {name}@validation"
            )
        return "hub", ()
    raise ValueError(f"{flag} {name!r} does not exist; give a file, a directory or a hub data set")


def _check_one_split(directory: Path, files: Sequence[str], flag: str) -> None:
    """Who clones a data set has what is to be held out of training in the same directory."""
    found: dict[str, str] = {}
    for file in files:
        name = os.path.relpath(file, directory)
        # `datasets` takes the first split that a name fits.
        split = next((s for s, words in _SPLITS.items() if words.search(name)), None)
        if split is not None:
            found.setdefault(split, name)
    if len(found) > 1:
        listed = ", ".join(f"{split} ({name})" for split, name in found.items())
        raise ValueError(
            f"{flag} {str(directory)!r} holds several splits: {listed}; name the files of one"
        )


def _files_below(directory: Path, suffixes: tuple[str, ...] | None) -> tuple[str, ...]:
    found = (p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("."))
    return tuple(sorted(str(p) for p in found if suffixes is None or p.name.endswith(suffixes)))
