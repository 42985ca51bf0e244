"""The log of a run: its settings, and the reward of every member that was evaluated.

settings.json       what the rewards depend on; a run that differs is refused
members.0.jsonl     iteration, member, seed, reward; one file a process, a line as it comes
master.N.safetensors  the float32 weights after N iterations, from which the log is replayed
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dft.hf.collective import raise_together
from megatron_dft.rollout.store import LineFile, agree, read_lines, write_settings

FORMAT = 1


class RewardLog:
    """Rewards of one directory; this process writes `members.{rank}.jsonl`."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        """Collective. Raises ValueError where the directory holds another run, or a process writes
        there."""
        self.directory = directory
        error: Exception | None = None
        if rank == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                found = {"format": FORMAT, **settings}
                if not agree(directory, found, "a run", "members.*.jsonl"):
                    write_settings(directory, found)
            except (OSError, ValueError) as e:
                error = ValueError(str(e))
        raise_together(error)
        self._file = LineFile(directory / f"members.{rank}.jsonl")

    def append(self, iteration: int, member: int, seed: int, reward: float) -> None:
        """On the disk when it returns."""
        record = {"iteration": iteration, "member": member, "seed": seed, "reward": reward}
        self._file.append([record])

    def rewards(self) -> dict[tuple[int, int], float]:
        """(iteration, member) → reward, of all processes."""
        found: dict[tuple[int, int], float] = {}
        for path in sorted(self.directory.glob("members.*.jsonl")):
            for r in read_lines(path):
                found.setdefault((r["iteration"], r["member"]), r["reward"])
        return found

    def close(self) -> None:
        self._file.close()


def master_file(directory: Path, iteration: int) -> Path:
    return directory / f"master.{iteration}.safetensors"


def newest_master(directory: Path, most: int) -> int:
    """The last iteration, of at most `most`, whose float32 weights are there; 0 without any."""
    names = (p.name.split(".")[1] for p in directory.glob("master.*.safetensors"))
    return max((int(n) for n in names if n.isdecimal() and int(n) <= most), default=0)
