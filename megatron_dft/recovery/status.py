"""The one word that a run leaves for its launcher: finished, stopped, refused, bad-numbers, hang.

A launcher may not trust an exit status alone: srun and torchrun fold many into 0 and 1. No word
means that the run died.
"""

import os
from pathlib import Path

VARIABLE = "MEGATRON_DFT_STATUS"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of `text` or not at all, also after a power cut."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def record(word: str, detail: str | int = "") -> None:
    """Write `word detail` to the file of $MEGATRON_DFT_STATUS; nothing where it is not set."""
    name = os.environ.get(VARIABLE)
    if name:
        write_whole(Path(name), f"{word} {detail}\n")
