"""The one word that a run leaves for its launcher: finished, stopped, refused, bad-numbers, hang.

A launcher may not trust an exit status alone: srun and torchrun fold many into 0 and 1. No word
means that the run died.
"""

import os
from pathlib import Path

from megatron_dft.storage.files import write_whole

VARIABLE = "MEGATRON_DFT_STATUS"


def record(word: str, detail: str | int = "") -> None:
    """Write `word detail` to the file of $MEGATRON_DFT_STATUS; nothing where it is not set."""
    name = os.environ.get(VARIABLE)
    if name:
        write_whole(Path(name), f"{word} {detail}\n")
