"""Under --async-save the process that writes a rank's files hashes them too: training goes on.

Megatron's request holds the function that its writer process calls (megatron-core 0.19.2,
core/dist_checkpointing/strategies/async_utils.py). Ours calls it and leaves the hashes in a file of
the directory, which the commit takes away.
"""

import json
from pathlib import Path
from typing import Any

from megatron_dft.recovery import manifest
from megatron_dft.storage.files import read_json_object, write_whole


class HashingWrite:
    """What a writer process is given in the place of Megatron's function; picklable."""

    def __init__(self, write: Any, directory: Path, rank: int, world_size: int) -> None:
        self.write, self.directory = write, directory
        self.rank, self.world_size = rank, world_size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.write(*args, **kwargs)
        # Its own files alone: what else there is, other processes are writing at this moment.
        files = manifest.files_of(self.directory, self.rank, self.world_size)
        shards = manifest.describe(self.directory, [f for f in files if f.suffix == ".distcp"])
        write_whole(_path(self.directory, self.rank), json.dumps(shards))
        return result


def in_the_background(request: Any, directory: Path, rank: int, world_size: int) -> Any:
    """The request, whose writer hashes what it has written; the same where it writes nothing."""
    if request.async_fn is None:
        return request
    write = HashingWrite(request.async_fn, directory, rank, world_size)
    return request._replace(async_fn=write)


def take(directory: Path, rank: int) -> dict[str, dict[str, Any]]:
    """The hashes that this rank's writer left, taken away; none where it left none."""
    path = _path(directory, rank)
    if not path.exists():
        return {}
    found = read_json_object(path)
    path.unlink()
    return found


def _path(directory: Path, rank: int) -> Path:
    return directory / f"{manifest.HASHES}{rank}.json"
