"""Where real Megatron-LM scripts come from: MEGATRON_LM_DIRS, or a mirror of the repository.

MEGATRON_LM_DIRS is a list of checkouts, separated like PATH's entries; MEGATRON_LM_MIRROR a git
directory (default: one beside this checkout). None of them is changed, and nothing of them is kept
here.
"""

import os
import subprocess
from functools import cache
from pathlib import Path

_BESIDE = Path(__file__).parents[3] / ".mirror" / "NVIDIA+Megatron-LM" / "repo"
MIRROR = Path(os.environ.get("MEGATRON_LM_MIRROR", _BESIDE))
RELEASES = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_r0.19.0", "main")
FILES = (
    "pretrain_gpt.py",
    "gpt_builders.py",
    "model_provider.py",
    "megatron/core/package_info.py",
)


@cache
def sources() -> dict[str, Path | str]:
    """Name of a real tree → its directory, or its branch or tag in the mirror."""
    given = os.environ.get("MEGATRON_LM_DIRS")
    if given:
        return {Path(one).name: Path(one) for one in given.split(os.pathsep) if one}
    return {release: release for release in RELEASES} if MIRROR.is_dir() else {}


def copy_scripts(name: str, directory: Path) -> Path:
    """A directory with that tree's scripts and package_info.py, to be changed at will."""
    source = sources()[name]
    for file in FILES:
        target = directory / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            target.write_bytes((source / file).read_bytes())
        else:
            command = ["git", "-C", str(MIRROR), "show", f"{source}:{file}"]
            target.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return directory
