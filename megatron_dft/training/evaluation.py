"""One line an evaluation, with the figures that mean something of a validation set.

Megatron prints each figure of an evaluation with its perplexity; exp(mean probability) is none. The
cross entropy is left to it, everything else is taken out of its hands and said, and written to
TensorBoard and W&B, here.
"""

from typing import Any

import torch.distributed as dist
from megatron.training import get_tensorboard_writer, get_wandb_writer

from megatron_dft.compat.loop import on_evaluation
from megatron_dft.losses.report import CROSS_ENTROPY
from megatron_dft.storage import terminal
from megatron_dft.training.progress import of_items, short_figures

_PAIRS = (
    ("dpo loss", "dpo loss"),
    ("rewards/accuracies", "pairs right"),
    ("rewards/margins", "margin"),
)


class Evaluation:
    """Hooked into Megatron's evaluation by `install`; args: Megatron's."""

    def __init__(self, args: Any, whole: bool) -> None:
        self.args, self.whole = args, whole
        self.last: int | None = None  # the step of the last evaluation

    def install(self) -> None:
        """Hook it in."""
        on_evaluation(self._is_due, self._log)

    def _is_due(self, step: int) -> bool:
        """Megatron evaluates after the last step twice where the interval ends there."""
        again = self.whole and step == self.last
        self.last = step
        return not again

    def _log(self, found: dict[str, Any], step: int) -> None:
        """found: name → mean; those that Megatron may log stay in it."""
        if dist.get_rank() == dist.get_world_size() - 1:
            self._say({name: float(value) for name, value in found.items()}, step)
        for name in [name for name in found if name != CROSS_ENTROPY]:
            del found[name]

    def _say(self, figures: dict[str, float], step: int) -> None:
        parts = [f"evaluation after step {step}", f"{CROSS_ENTROPY} {figures[CROSS_ENTROPY]:.4f}"]
        parts += short_figures(figures)
        parts += [f"{short} {figures[name]:.4f}" for name, short in _PAIRS if name in figures]
        parts += of_items(figures)
        terminal.say(" | ".join(parts))
        if self.args.skip_train:
            return
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for name, value in figures.items():
            if writer is not None and name != CROSS_ENTROPY:
                writer.add_scalar(f"{name} validation", value, step)
        if wandb:
            own = {f"{n} validation": v for n, v in figures.items() if n != CROSS_ENTROPY}
            wandb.log(own, step)
