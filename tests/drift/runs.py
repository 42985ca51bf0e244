"""Runs made up for the comparison: TensorBoard's event files as Megatron writes them."""

import math
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

Figures = dict[str, dict[int, float]]


def write_events(
    directory: Path, figures: Figures, settings: dict[str, Any] | None = None, time: float = 1e9
) -> None:
    """One start of a run: an event file of `figures`, a second a step, and of the arguments."""
    writer = EventFileWriter(str(directory), filename_suffix=f".{time:.0f}")
    for name, value in (settings or {}).items():
        text = TensorProto(dtype=DT_STRING, string_val=[str(value).encode()])
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        found = Summary.Value(tag=f"{name}/text_summary", metadata=kind, tensor=text)
        writer.add_event(Event(step=0, wall_time=time, summary=Summary(value=[found])))
    for tag, series in figures.items():
        for step, value in series.items():
            for name in (tag, f"{tag} vs samples"):
                at = step if name == tag else 8 * step
                scalar = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                writer.add_event(Event(step=at, wall_time=time + step, summary=scalar))
    writer.close()


def curve(loss: str, rate: float, steps: range, every: int = 1) -> dict[int, float]:
    """A cross entropy that falls, under sft at a high rate rises again."""
    found = {}
    for step in steps:
        if step % every == 0:
            fall = math.exp(-step * rate * 600)
            rise = 0.004 * step * rate * 1e4 if loss == "sft" else 0.0
            noise = 0.0 if every > 1 else 0.05 * math.sin(step * 12.9898 + len(loss))
            found[step] = 0.5 + 0.6 * fall + rise + noise
    return found


def run(loss: str, rate: float, steps: range) -> Figures:
    """All figures of one start."""
    evaluated = curve(loss, rate, steps, 20)
    sharp = 0.08 if loss == "dft" else 0.0
    return {
        "lm loss": curve(loss, rate, steps),
        "lm loss validation": evaluated,
        "dft/mean-prob validation": {s: math.exp(-v) + sharp for s, v in evaluated.items()},
        "dft/token-accuracy validation": {s: 0.9 - v / 3 for s, v in evaluated.items()},
        "dft/end-prob validation": {s: 0.97 - sharp for s in evaluated},
        "grad-norm": {s: (1 + 3 / (1 + s)) * (0.4 if loss == "dft" else 1) for s in steps},
        "learning-rate": {s: rate * min(1, (s + 1) / 20) for s in steps},
    }


def sweep(directory: Path, losses: tuple[str, ...] = ("sft", "dft")) -> Path:
    """Every loss at three rates, 200 steps each, with the word of the launcher."""
    for loss in losses:
        for rate in (1e-5, 2e-5, 5e-5):
            cell = directory / f"{loss}-{rate:.0e}".replace("e-0", "e-")
            settings = {
                "loss": loss, "lr": rate, "train_iters": 200, "hf_model": "Qwen/Qwen2.5-Math-1.5B",
                "save": cell / "checkpoints", "tensorboard_dir": cell / "tensorboard",
                "valid_data": "['valid.jsonl']", "seed": 1234,
            }  # fmt: skip
            write_events(cell / "tensorboard", run(loss, rate, range(1, 201)), settings)
            (cell / "SUCCESS").write_text("step 200\n")
    return directory
