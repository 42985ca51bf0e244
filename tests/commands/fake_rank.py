"""A rank that does as its word says; `python -m tests.commands.fake_rank WORD DIRECTORY`."""

import os
import signal
import sys
import time
from pathlib import Path

rank, word, directory = os.environ["RANK"], sys.argv[1], Path(sys.argv[2])


def forever() -> None:
    while True:
        time.sleep(0.05)


def note(name: str) -> None:
    (directory / f"{name}-{rank}").touch()


(directory / f"env-{rank}").write_text(
    " ".join(os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
)
if word == "crash":
    sys.exit(3) if rank == "1" else forever()
elif word == "killed":
    os.kill(os.getpid(), signal.SIGKILL) if rank == "1" else forever()
elif word == "refuse":  # rank 0 speaks, after the others have left
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == "0":
        while not (other := directory / "pid-1").exists() or not (pid := other.read_text()):
            time.sleep(0.02)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.02)
        print("error: --lr", file=sys.stderr)
    sys.exit(2)
elif word == "stop":
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    note("ready")
    while not asked:
        time.sleep(0.02)
    note("stopped")
    sys.exit(75)
elif word == "deaf":
    signal.signal(signal.SIGINT, lambda *_: note("heard"))
    note("ready")
    forever()
elif word == "orphan":
    (directory / f"pid-{rank}").write_text(str(os.getpid()))
    note("ready")
    forever()
