"""The weight-update lens inside a run: drift from the base while training, and the L2-SP anchor.

--log-drift-interval N logs ‖θ − θ₀‖, its ratio to ‖θ₀‖ and the share of weights unchanged at bf16,
of the whole model and of groups of layers. --l2sp-coeff λ pulls the weights back to θ₀ in the
optimizer's step. θ₀ are the Hugging Face weights, also in a resumed run. targets.py adapts λ.
"""

from typing import Any

import torch.distributed as dist
from megatron.training import get_tensorboard_writer

from megatron_dft.compat.loop import on_optimizer_built, sync_parameters
from megatron_dft.lens.anchor import L2SP
from megatron_dft.lens.parameters import all_labels, inner_optimizers, tracked_parameters
from megatron_dft.lens.targets import Targets
from megatron_dft.lens.tracker import MODEL, UpdateTracker
from megatron_dft.storage import terminal


def is_wanted(args: Any) -> bool:
    """Whether the run needs θ₀."""
    return bool(args.log_drift_interval or args.l2sp_coeff)


class Lens:
    """Made before the model is built; `track` is called on the bare chunks when they hold θ₀."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.tracker: UpdateTracker | None = None
        self.anchors: list[L2SP] = []
        self.targets = Targets(args, self.anchors)
        if args.l2sp_coeff:
            # The optimizer copies the weights when it is made, before a checkpoint is loaded.
            on_optimizer_built(self._anchor)

    def track(self, chunks: list[Any], vocab_size: int) -> None:
        """Remember the starting weights, on the CPU; vocab_size: without Megatron's padding."""
        if not (self.args.log_drift_interval or self.targets.needs_norm):
            return
        layers = self.args.num_layers
        self.tracker = UpdateTracker(
            tracked_parameters(chunks, layers, vocab_size), all_labels(layers)
        )

    def _anchor(self, optimizer: Any) -> None:
        self.anchors[:] = [L2SP(o, self.args.l2sp_coeff) for o in inner_optimizers(optimizer)]

    def after_step(self, chunks: list[Any], iteration: int) -> None:
        """Measure, log where it is time, and steer the anchors. Collective."""
        interval = self.args.log_drift_interval
        is_logged = bool(interval) and iteration % interval == 0
        table = None
        if self.tracker is not None and (is_logged or self.targets.needs_norm):
            sync_parameters(chunks, self.args)
            table = self.tracker.measure()
        self.targets.after_step(table)
        if table is not None and is_logged:
            _log(table, iteration)


def _log(table: dict[str, dict[str, float]], iteration: int) -> None:
    writer = get_tensorboard_writer()
    if writer is not None:
        for label, figures in table.items():
            for name, value in figures.items():
                writer.add_scalar(f"drift/{label}/{name}", value, iteration)
    if dist.get_rank() == dist.get_world_size() - 1:
        whole = table[MODEL]
        groups = " | ".join(f"{k} {v['relative_norm']:.2e}" for k, v in table.items() if k != MODEL)
        terminal.say(
            f"drift at step {iteration}: norm {whole['update_norm']:.6g}, relative "
            f"{whole['relative_norm']:.6g}, unchanged at bf16 {whole['unchanged_bf16']:.6f}"
            f" | relative by group: {groups}"
        )
