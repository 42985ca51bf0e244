"""Who holds a lock: a process told from every other of all machines, and whether it lives."""

import dataclasses
import json
import os
import socket
import time
import uuid
from pathlib import Path

PROGRAM = "megatron_dft"


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, told from every other of all machines. `since` is for people alone."""

    host: str
    pid: int
    started: str  # of /proc, in ticks since boot; "" where there is no /proc
    space: str  # boot and process namespace
    job: str
    leg: int
    token: str
    since: str

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def _started(pid: int) -> str:
    """When a living process began; "" where there is none."""
    try:
        # The name may hold anything, so that fields are counted from its closing bracket.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def myself() -> Owner:
    job, leg = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    return Owner(
        host=socket.gethostname()[:255],
        pid=os.getpid(),
        started=_started(os.getpid()),
        space=_space(),
        job=job[:40],
        leg=int(leg) if leg.isdecimal() and leg.isascii() else 0,
        token=uuid.uuid4().hex,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def parse(content: bytes) -> Owner | None:
    """None: a file that its owner has not filled yet. ValueError: not a lock of ours."""
    if not content.strip():
        return None
    try:
        found = json.loads(content)
        assert found.pop("program") == PROGRAM
        owner = Owner(**found)
        for one in dataclasses.fields(Owner):
            assert type(getattr(owner, one.name)) is one.type
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError):
        raise ValueError("is not a lock of this program") from None
    return owner


def is_dead(owner: Owner, me: Owner) -> bool | None:
    """None where only the beats can tell."""
    if owner.job and owner.job == me.job and owner.leg < me.leg:
        return True  # Slurm ended that leg before it began this one
    if owner.host == me.host and owner.space == me.space and owner.space and owner.started:
        return _started(owner.pid) != owner.started
    return None
