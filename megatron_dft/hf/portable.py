"""A command line and a model's name as another machine can use them: no path of this one."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from megatron_dft.hf.source import HFCheckpoint

# A path from the root, from home or from above, also behind `0.7:`, `cap=3:` or `--flag=`. A URL's
# slashes come in twos, a hub name begins with a letter.
_PATH = re.compile(r"(?<![\w/.~-])(?:~|\.{1,2})?/(?!/)[^:,]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # huggingface_hub's folder of a model


def is_hub_name(text: str) -> bool:
    """Whether it is written as ORGANISATION/NAME."""
    return _HUB_NAME.fullmatch(text) is not None


def hub_name(checkpoint: HFCheckpoint) -> tuple[str | None, str | None]:
    """(the model's name on the hub, its commit): those asked for, or those of the hub cache's
    folder that it lies in; None for any other directory."""
    if checkpoint.revision and is_hub_name(checkpoint.name):
        return checkpoint.name, checkpoint.revision
    path = checkpoint.path.absolute()
    if path.parent.name == "snapshots" and (found := _CACHED.fullmatch(path.parent.parent.name)):
        return f"{found[1]}/{found[2]}", path.name
    return None, checkpoint.revision


def _tails(paths: Iterable[str]) -> dict[str, str]:
    """path → its last part, with as many before it as tell it from the others."""
    found = {}
    wanted = {path: PurePath(path).parts for path in paths}
    for path, parts in wanted.items():
        others = [other for p, other in wanted.items() if other != parts]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        found[path] = "/".join(parts[-length:]).strip("/") or "."
    return found


def portable(words: Iterable[str], names: Mapping[str, str] | None = None) -> list[str]:
    """The words with each path of this machine as its last part alone; two that end alike keep
    more. `names`: what stands for certain paths, such as a model's hub name for its directory."""
    words, names = list(words), dict(names or {})
    paths = [m for word in words for m in _PATH.findall(word)]
    short = _tails(paths) | names
    return [
        names.get(word) or _PATH.sub(lambda m: short.get(m[0].rstrip("/"), short[m[0]]), word)
        for word in words
    ]
