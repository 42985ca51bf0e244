"""What a run gives besides Megatron's log: progress lines and Hugging Face exports."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_tensorboard_writer

from megatron_dft.compat.loop import after_training_step, on_training_log, sync_parameters
from megatron_dft.flags.settings import settings
from megatron_dft.hf.card import model_card
from megatron_dft.hf.export import save_hf
from megatron_dft.hf.portable import hub_name, portable
from megatron_dft.hf.secrets import masked_line
from megatron_dft.hf.source import HFCheckpoint
from megatron_dft.losses.report import CROSS_ENTROPY, ROWS_DROPPED
from megatron_dft.step.chunked_head import row_filter
from megatron_dft.step.loss import FIGURES
from megatron_dft.storage import terminal
from megatron_dft.storage.dtypes import WORDS
from megatron_dft.storage.files import sha256_of_file
from megatron_dft.training.end_watch import EndWatch
from megatron_dft.training.model import ModelHandle
from megatron_dft.training.progress import Progress, choose
from megatron_dft.training.trained_chat import trained_chat

_CARD_SETTINGS = (
    "lr",
    "dft_full_weight",
    "train_iters",
    "global_batch_size",
    "seq_length",
    "seed",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "clip_grad",
    "bf16",
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


class Output:
    """Hooked into Megatron's loop by `install`; `finish` is called when training has ended."""

    def __init__(self, args: Any, handle: ModelHandle) -> None:
        self.args, self.handle = args, handle
        self.progress: Progress | None = None
        self.losses: dict[str, Any] = {}
        self.ends = EndWatch()

    def install(self) -> None:
        """Hook the progress line and the exports into the training loop."""
        on_training_log(self._log)
        after_training_step(self._after_step)

    def finish(self) -> None:
        """The export at the end of training, and whether the model has learnt to stop."""
        writer = get_tensorboard_writer()
        if writer is not None:  # Megatron did it before the last evaluation
            writer.flush()
        objective, warning = settings().objective, None
        if not objective.signed:  # else the ends of bad answers, which are to fade, are among them
            warning = self.ends.warning(objective.name, self.args.dft_full_weight)
        if warning is not None and dist.get_rank() == dist.get_world_size() - 1:
            terminal.say(f"> warning: {warning}")
        if self.args.save_hf is not None:
            self.export(Path(self.args.save_hf))

    def _is_due(self, call: dict[str, Any]) -> bool:
        """Whether anyone reads the figures of this step: a line, a writer, a held target."""
        args, step = self.args, call["iteration"]
        writes = args.tensorboard_dir or getattr(args, "wandb_project", "")
        return bool(
            step % args.log_interval == 0
            or call.get("is_first_iteration")
            or (writes and step % args.tensorboard_log_interval == 0)
            or self.handle.lens.targets.controllers
        )

    def _log(self, losses: dict[str, Any], call: dict[str, Any]) -> None:
        skipped = bool(call["skipped_iter"])
        FIGURES.close_step(keep=not skipped)
        found: dict[str, Any] = {}
        steps = 0
        if self._is_due(call):
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            found, steps = FIGURES.take(group)
            found.pop(CROSS_ENTROPY, None)  # Megatron has it from each step
            if steps and (rows := row_filter()) is not None:
                found[ROWS_DROPPED] = torch.tensor(rows.take(group))
            losses.update(found)
        self.handle.lens.targets.before_log(losses)
        if self.progress is None:
            # One-time set-up here: the global batch and the writers exist only inside the loop.
            args = self.args
            micro_batches = args.global_batch_size // args.micro_batch_size
            self.progress = Progress(
                choose(args.progress),
                dist.get_rank() == dist.get_world_size() - 1,
                micro_batches * args.context_parallel_size,
                args.train_iters,
                args.log_interval,
                get_tensorboard_writer(),
            )
        self.progress.log(losses, call)
        self.ends.log(losses)
        # Megatron averages what it is told in each step; it has not heard of these steps yet.
        unheard, total = steps - (not skipped), call["total_loss_dict"]
        for name in found.keys() & losses.keys() if unheard else ():
            total[name] = total.get(name, 0.0) + unheard * found[name]
        # As they are: reading them here would wait for the device in every step.
        self.losses = {**self.losses, **losses}

    def _after_step(self, chunks: list[Any], iteration: int) -> None:
        self.handle.lens.after_step(chunks, iteration)
        interval = self.args.save_hf_interval
        if interval and iteration % interval == 0 and iteration < self.args.train_iters:
            self.export(Path(f"{self.args.save_hf}-step-{iteration}"))

    def export(self, directory: Path) -> None:
        """Write the model as a Hugging Face checkpoint. Collective over all ranks."""
        checkpoint = settings().checkpoint
        assert checkpoint is not None
        sync_parameters(self.handle.chunks, self.args)
        # The figures are known to the last pipeline stage; the first rank writes the card.
        metrics: list[Any] = [{name: float(value) for name, value in self.losses.items()}]
        dist.broadcast_object_list(metrics, src=dist.get_world_size() - 1)
        name = self.args.save_hf_dtype
        path = save_hf(
            self.handle.chunks,
            checkpoint,
            directory,
            dtype=WORDS[name] if name else None,
            overwrite=self.args.overwrite,
            card=self._card(metrics[0]) if dist.get_rank() == 0 else None,
            chat=trained_chat(self.args),
        )
        if dist.get_rank() == 0:
            terminal.say(f"> Hugging Face checkpoint: {path}")

    def _card(self, metrics: dict[str, float]) -> str:
        checkpoint, objective = settings().checkpoint, settings().objective
        assert checkpoint is not None
        chosen = {name: getattr(self.args, name) for name in _CARD_SETTINGS}
        return model_card(
            checkpoint,
            objective=objective.name,
            parameters={**objective.settings, **chosen},
            data={name: _content(name) for name in self.args.train_data or ()},
            metrics=metrics,
            command=_command(self.args, checkpoint),
            base_model=self.args.hf_base_model,
        )


def _command(args: Any, checkpoint: HFCheckpoint) -> str:
    """The launch of this run as a shell takes it elsewhere: no key in it, no path of this one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    launch = ["megatron-dft", "train", "--nproc-per-node", str(here)]
    if args.world_size > here:
        nodes = ["--nnodes", str(args.world_size // here), "--nproc-per-node", str(here)]
        launch = ["torchrun", *nodes, "-m", "megatron_dft.train"]
    base = args.hf_base_model or hub_name(checkpoint)[0]
    words = portable(sys.argv[1:], {checkpoint.name: base} if base else None)
    return masked_line([*launch, *words])


def _content(source: str) -> str:
    """SHA-256 of a source that is one file."""
    path = Path(source.split(":", 1)[-1])
    if not path.is_file():
        return "not one file"
    return sha256_of_file(path)
