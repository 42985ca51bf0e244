"""What a training run left on disk, without Megatron: figures by step, settings, how it ended.

The figures are in TensorBoard's event files, with every argument as a text beside them. A run that
was resumed has several files; steps that were lost with a crash and trained again count once.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

Series = dict[int, float]  # step → figure
_EVENTS = "events.out.tfevents"
_FOLDERS = ("tensorboard", "tb", "logs")  # inside a run's directory
_TEXT = "/text_summary"


@dataclasses.dataclass(frozen=True)
class Run:
    """label: distinct in a report. figures: tag → its series. settings: Megatron's arguments by
    name, as text, those of the last start. seconds: between the first figure and the last, of each
    start. status: `finished`, another word of the run, or "" where there is none. not_finite: how
    many figures were NaN or inf; they are in no series."""

    label: str
    directory: Path
    figures: dict[str, Series]
    settings: dict[str, str]
    seconds: float
    status: str
    not_finite: int = 0

    @property
    def step(self) -> int:
        """The last step that has a figure."""
        return max((max(series) for series in self.figures.values() if series), default=0)

    def number(self, setting: str) -> float | None:
        try:
            return float(self.settings[setting])
        except (KeyError, ValueError):
            return None


def _event_folders(path: Path) -> dict[Path, list[Path]]:
    """Each directory at or below `path` that has event files, with them."""
    found: dict[Path, list[Path]] = {}
    for directory, below, names in os.walk(path):
        below[:] = sorted(d for d in below if not d.startswith(("iter_", ".")))
        files = [Path(directory, name) for name in names if _EVENTS in name]
        if files:
            found[Path(directory)] = files
    return found


def _run_directory(folder: Path) -> Path:
    return folder.parent if folder.name in _FOLDERS else folder


def _status(directory: Path) -> str:
    """The run's own word: of the launcher's SUCCESS, else of the last leg."""
    if (directory / "SUCCESS").is_file():
        return "finished"
    legs = [p for p in (directory / "legs").glob("*/status") if p.parent.name.isdecimal()]
    last = max(legs, key=lambda p: int(p.parent.name), default=directory / "status")
    try:
        words = last.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return ""
    return words[0] if words else ""


def _one_file(path: Path) -> tuple[dict[str, list[tuple[int, float, float]]], dict[str, str]]:
    """(tag → (step, time, value) in order, settings) of one event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {
        tag: [(e.step, e.wall_time, e.value) for e in events.Scalars(tag)]
        for tag in tags["scalars"]
        if not tag.endswith(" vs samples")
    }
    settings = {}
    for tag in tags["tensors"]:
        words = events.Tensors(tag)[-1].tensor_proto.string_val
        if tag.endswith(_TEXT) and words:
            settings[tag.removesuffix(_TEXT)] = words[0].decode("utf-8", "replace")
    return {tag: points for tag, points in scalars.items() if points}, settings


def _read(directory: Path, files: Sequence[Path], label: str) -> Run:
    parts = [part for part in map(_one_file, files) if part[0]]

    def times(part) -> list[float]:
        return [time for points in part[0].values() for _, time, _ in points]

    figures: dict[str, Series] = {}
    settings: dict[str, str] = {}
    seconds, not_finite = 0.0, 0
    for part in sorted(parts, key=lambda p: min(times(p))):
        first = min(step for points in part[0].values() for step, *_ in points)
        for series in figures.values():  # the steps that this start trains again
            for step in [s for s in series if s >= first]:
                del series[step]
        for tag, points in part[0].items():
            good = [(step, value) for step, _, value in points if math.isfinite(value)]
            figures.setdefault(tag, {}).update(good)
            not_finite += len(points) - len(good)
        settings = part[1] or settings
        seconds += max(times(part)) - min(times(part))
    figures = {tag: series for tag, series in figures.items() if series}
    return Run(label, directory, figures, settings, seconds, _status(directory), not_finite)


def _distinct(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `dft-5e-5`, or `first/dft-5e-5`."""
    for length in range(1, 1 + max(len(d.parts) for d in directories)):
        names = ["/".join(d.parts[-length:]) for d in directories]
        if len(set(names)) == len(names):
            return names
    return [str(d) for d in directories]


def read_runs(paths: Iterable[Path], labels: Sequence[str] | None = None) -> list[Run]:
    """The runs at or below each path, sorted by path: a sweep's directory gives all of its runs.

    Raises ValueError where a path has no event files with figures, and for labels that do not fit.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        found = _event_folders(path.resolve())
        if not found:
            what = "has no TensorBoard event files" if path.is_dir() else "is not a directory"
            raise ValueError(
                f"RUN: expected the directory of a run or of a sweep, got {path}, which {what}; "
                "train with --tensorboard-dir RUN_DIR/tensorboard"
            )
        folders |= {folder: found[folder] for folder in sorted(found, key=_natural)}
    directories = [_run_directory(folder) for folder in folders]
    names = list(labels) if labels is not None else _distinct(directories)
    if len(names) != len(directories) or len(set(names)) != len(names):
        raise ValueError(
            f"--labels: expected {len(directories)} different names, one for each of "
            f"{', '.join(_distinct(directories))}; got {' '.join(names)}"
        )
    whole = zip(directories, folders.values(), names, strict=True)
    runs = [_read(directory, files, label) for directory, files, label in whole]
    for run in runs:
        if not run.figures:
            raise ValueError(f"RUN: {run.directory} has event files without a figure yet")
    return runs


def _natural(path: Path) -> list[tuple[int, float, str]]:
    """Sorts 2e-5 after 1e-5 and run-10 after run-9."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", str(path))
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(parts)]
