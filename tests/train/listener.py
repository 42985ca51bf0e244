"""What a rank of a training run sees: the figures of each step, and the rows that it was given."""

import zlib
from collections.abc import Callable
from typing import Any


def on_figures(note: Callable[[dict[str, float]], None]) -> None:
    """`note` gets the figures of each step: "step", "grad_norm", the losses; last stage only."""
    from megatron_dft.losses import report
    from megatron_dft.training import progress

    plain = progress.Progress.log

    def log(self: Any, losses: dict[str, Any], call: dict[str, Any]) -> None:
        if losses:
            figures = {name: float(value) for name, value in losses.items()}
            # A mean over context-parallel ranks too: the one figure that depends on the layout.
            figures.pop(report.TOKENS)
            figures["grad_norm"] = float(call["grad_norm"])
            figures["step"] = call["iteration"]
            note(figures)
        plain(self, losses, call)

    progress.Progress.log = log  # type: ignore[method-assign]


def on_rows(note: Callable[[int, list[int]], None]) -> None:
    """`note` gets step and checksums of the rows of each micro-batch, on every rank."""
    from megatron.training import get_args

    from megatron_dft.step import forward_step

    plain = forward_step.get_batch

    def get_batch(iterator: Any, training: bool) -> Any:
        batch = plain(iterator, training)
        rows = [zlib.crc32(row.numpy().tobytes()) for row in batch.tokens.cpu()]
        note(get_args().curr_iteration + 1, rows)
        return batch

    forward_step.get_batch = get_batch
