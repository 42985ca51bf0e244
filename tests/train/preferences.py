"""Pairs of answers for the tests of DPO: text, so that TRL's tokens are ours."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# Rows of two and of three pairs.
SEQ_LENGTH, PAIRS, ROWS = 96, 10, 4
RUN: dict[str, Any] = dict(beta=0.3, lr=1e-3, steps=20)


def pairs() -> list[dict[str, str]]:
    """Answers of several lengths, some of one token and its end."""
    good = ["two", "4", "six.", "eight it is", "10", "twelve", "14!", "sixteen", "18", "20."]
    bad = ["3", "five", "7", "nine", "eleven then", "13", "fifteen", "x", "y", "nought"]
    return [
        {"prompt": f"{n} + {n} =", "chosen": f" {good[n - 1]}", "rejected": f" {bad[n - 1]}"}
        for n in range(1, PAIRS + 1)
    ]


def digest(directory: Path) -> str:
    """SHA-256 of a checkpoint's tensors, by name."""
    found = hashlib.sha256()
    for name, value in sorted(load_file(directory / "model.safetensors").items()):
        found.update(name.encode() + value.float().numpy().tobytes())
    return found.hexdigest()


def write_pairs(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    return path
