"""What a report calls a model: a label for each tuned one, a readable name for any path."""

from pathlib import Path

# Names of directories that say what lies there, not which model it is.
_GENERIC = (
    "hf",
    "model",
    "base",
    "out",
    "export",
    "checkpoint",
    "checkpoints",
    "ckpt",
    "snapshots",
)


def labels_for(paths: list[Path], given: list[str] | None) -> list[str]:
    """One distinct label a path. Raises ValueError if `given` does not fit."""
    if given is not None:
        if len(given) != len(paths) or len(set(given)) != len(given):
            raise ValueError(
                f"--labels: expected {len(paths)} different names (one for each TUNED), got "
                f"{' '.join(given)}; name each once"
            )
        return given
    names = [p.resolve().name for p in paths]
    if len(set(names)) == len(names):
        return names
    return [f"{n}-{i + 1}" for i, n in enumerate(names)]


def model_name(path: str | Path) -> str:
    """The directory's name, after its parent's where it is a generic one (`run-7/hf`)."""
    path = Path(path)
    if not path.name or path.name in (".", ".."):
        path = path.resolve()
    is_generic = path.name.lower() in _GENERIC or path.name.startswith(("iter_", "step"))
    if is_generic and path.parent.name:
        return f"{path.parent.name}/{path.name}"
    return path.name
