"""`megatron-dft train --dry-run`: everything that a run refuses, before a GPU is asked for.

With `--device cuda` on a machine without a GPU the flags are judged for one that has, as on a login
node. This process plays the first of WORLD_SIZE ranks: flags, layout, model files, tokenizer, chat
template and data go through the run's own checks, and the directories that it writes to are looked
at. No model is built; nothing is written but the cache of tokenised data.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_dft.storage import terminal

if __name__ == "__main__":  # before the imports that warn
    terminal.divert()

import torch

from megatron_dft.cpu import runtime
from megatron_dft.flags import device, objective
from megatron_dft.flags.defaults import requested_device
from megatron_dft.flags.settings import settings
from megatron_dft.recovery.exit_codes import FINISHED, REFUSED
from megatron_dft.training.launch import configure, one_line
from megatron_dft.training.log_file import run_program

# Of a parameter: Adam's two moments and the master weight in fp32, and where they are not the same
# the weight that is trained.
_OPTIMIZER_BYTES, _MASTER_BYTES, _HALF_BYTES = 8, 4, 2


def main() -> int:
    """Status 0 where the run would start, 2 with the reason in one line where not."""
    rows = take_rows(sys.argv)
    asked = requested_device(sys.argv[1:])
    for_gpus = asked == "cuda" and not torch.cuda.is_available()
    try:
        args = configure(sys.argv[1:], lambda args: _check(args, rows), for_gpus=for_gpus)
    except (ValueError, AssertionError) as error:
        terminal.fail(one_line(error))
        return REFUSED
    ranks = int(os.environ["WORLD_SIZE"])
    for line in _of_device(args, asked, for_gpus):
        terminal.say(f"> {line}")
    terminal.say(f"> {settings().route.line}")
    read = "" if rows is None else f"; of the data the first {rows} rows of each item were read"
    layout = " ".join(
        f"{name} {getattr(args, f'{dest}_parallel_size')}"
        for name, dest in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("CP", "context"))
    )
    terminal.say(f"> dry run: {ranks} ranks ({layout}) would start{read}")
    return FINISHED


def _of_device(args: Any, asked: str, for_gpus: bool) -> list[str]:
    """Whose device the flags were judged by, where that is not plain."""
    if asked == "auto" and runtime.is_active():
        return ["no GPU here: checked as the CPU run that it is; --device cuda: for GPU nodes"]
    if not for_gpus:
        return []
    found = ["no GPU here: checked for GPU nodes; what they have, `megatron-dft preflight` sees"]
    without = None if device.transformer_engine_installed() else device.refused_without_te(args)
    if without is not None:
        found.append(
            "warning: this Python has no transformer-engine; nodes without it refuse the run: "
            f"{without}"
        )
    return found


def take_rows(argv: list[str]) -> int | None:
    """Take `--check-rows N` off the command line: how many rows of each item are read."""
    if "--check-rows" not in argv:
        return None
    at = argv.index("--check-rows")
    rows = int(argv[at + 1])
    del argv[at : at + 2]
    return rows


def _check(args: Any, rows: int | None) -> None:
    terminal.head(f"> {objective.line(sys.argv[1:], settings().objective)}")
    # Not earlier: importing Megatron has to find the device chosen.
    from megatron_dft.training import data_provider

    if rows is None:
        data_provider.prepare(args)
        data_provider.settle(args)
        for line in data_provider.figures(args):
            terminal.say(f"> {line}")
    else:
        data_provider.check_first_rows(args, rows)
    check_space(args)


def needed_bytes(args: Any, parameters: int, weights: int) -> dict[str, int]:
    """Flag → bytes that the run keeps there at its fullest.

    parameters: of the model; weights: bytes of the base checkpoint's files.
    """
    found = {}
    if args.save is not None:
        half = args.bf16 or args.fp16
        each = _MASTER_BYTES + (_HALF_BYTES if half else 0)
        each += 0 if args.no_save_optim else _OPTIMIZER_BYTES
        # The newest is whole before the oldest goes.
        kept = 1 if args.keep_last is None else args.keep_last + 1
        found["--save"] = parameters * each * kept
    if args.save_hf is not None:
        wide = {"float32": 4, "float16": 2, "bfloat16": 2}
        size = weights if args.save_hf_dtype is None else parameters * wide[args.save_hf_dtype]
        interval = args.save_hf_interval
        found["--save-hf"] = size * (1 + (args.train_iters or 0) // interval if interval else 1)
    return found


def check_space(args: Any) -> None:
    """Raise one ValueError where a directory cannot be written, or is too small for the run."""
    checkpoint = settings().checkpoint
    assert checkpoint is not None
    tensors = checkpoint.tensors.values()
    needed = needed_bytes(args, sum(t.numel for t in tensors), sum(t.nbytes for t in tensors))
    on_disk: dict[int, dict[str, int]] = {}  # device → flag → bytes
    for flag, size in needed.items():
        there = _nearest(Path(args.save if flag == "--save" else args.save_hf))
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{flag}: {there} cannot be written; choose another directory")
        together = on_disk.setdefault(there.stat().st_dev, {})
        together[flag] = size
        total, free = sum(together.values()), shutil.disk_usage(there).free
        if total > free:
            raise ValueError(
                f"{' and '.join(together)}: about {total / 1e9:.1f} GB will be written, {there} "
                f"has {free / 1e9:.1f} GB free; make room, or keep less (--keep-last, "
                "--no-save-optim)"
            )


def _nearest(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    whole = directory.absolute()
    return next(path for path in (whole, *whole.parents) if path.exists())


if __name__ == "__main__":
    run_program(main)
