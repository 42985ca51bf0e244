"""The methods that are compared: what each trains on, how it is started, and its own sweep."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megatron_dft.losses.registry import OBJECTIVES

RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """trainer: "train" (megatron_dft.train), "grpo" (TRL) or "es"; data: a file of `rows`; pairs:
    a row holds two answers; sweep: learning rates, or σ of ES; like: takes that method's choice.
    """

    trainer: str
    data: str
    sweep: tuple[float, ...] = RATES
    loss: str = ""
    pairs: bool = False
    like: str = ""


METHODS: dict[str, Method] = {
    "sft": Method("train", "demonstrations", loss="sft"),
    "dft": Method("train", "demonstrations", loss="dft"),
    "rft": Method("train", "kept", loss="sft"),
    "offline-dft": Method("train", "kept", loss="dft"),
    "rift": Method("train", "judged", loss="rift"),
    "dpo": Method("train", "pairs", (3e-5, 1e-4, 3e-4), loss="dpo", pairs=True),
    "grpo": Method("grpo", "problems", (3e-5, 1e-4, 3e-4)),
    "es": Method("es", "problems", (0.002, 0.004, 0.008)),
    "es+anchor": Method("es", "problems", like="es"),
}


def missing(method: Method) -> str | None:
    """Why it cannot be run here; None where it can."""
    if method.trainer == "train" and method.loss not in OBJECTIVES:
        return f"this release has no --loss {method.loss}"
    if method.trainer == "grpo" and importlib.util.find_spec("trl") is None:
        return "TRL is not installed (pip install trl)"
    return None


def snapshots(method: Method, out: Path, steps: int, count: int) -> list[tuple[int, Path]]:
    """(steps done, Hugging Face directory) of a run that writes `count` of them to its end."""
    every = steps // count
    if method.trainer == "es":
        return [(n, out / f"iteration-{n}") for n in range(every, steps + 1, every)]
    between = [(n, Path(f"{out}-step-{n}")) for n in range(every, steps, every)]
    return [*between, (steps, out)]
