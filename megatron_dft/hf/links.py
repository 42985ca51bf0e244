"""Files are copied out of a model directory alone: a link in it may not bring in one from outside.

Whoever gives a model away may have put a link to a key of the next person's home into it, and an
export is often pushed to a hub. The hub's own cache is made of links from `snapshots/COMMIT/` into
`blobs/` beside it, which belong to the model.
"""

import shutil
from pathlib import Path


def _homes(root: Path) -> list[Path]:
    """Where the files of a model directory may lie."""
    real = root.resolve()
    if real.parent.name == "snapshots":
        return [real, real.parent.parent / "blobs"]
    return [real]


def check(root: Path, file: Path) -> None:
    """Raise ValueError where `file`, of the model directory `root`, is a link out of it."""
    real = file.resolve()
    if not any(real.is_relative_to(home) for home in _homes(root)):
        raise ValueError(
            f"{root}: {file.relative_to(root)} is a link to {real}, outside the model: it would be "
            "copied into every export; put the file itself there"
        )


def copy(root: Path, file: Path, target: Path) -> None:
    """Copy a file of the model directory `root`; raises as `check` does."""
    check(root, file)
    # Not through a link that came to stand at the target; another writer's file gives way.
    target.unlink(missing_ok=True)
    with file.open("rb") as source, target.open("xb") as copied:
        shutil.copyfileobj(source, copied)
