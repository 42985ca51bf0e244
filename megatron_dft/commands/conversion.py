"""What `import` and `export` share: the source's flags, quiet imports, a bar, --verify."""

import argparse
import contextlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatron_dft.hf import bridge
from megatron_dft.hf.source import HFCheckpoint


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a Hugging Face checkpoint is opened."""
    bridge.add_argument(parser)
    parser.add_argument("--hf-revision", help="branch, tag or commit of the hub model")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accept a checkpoint that brings Python code (its weights are still read by our "
        "tables; transformers may run the code for the tokenizer)",
    )


def quiet() -> None:
    """Silence Python warnings (missing Apex, deprecated PyTorch calls) and Megatron's notices."""
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (bytes done, bytes in all) that moves a bar on a terminal, silent in a log."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as shown:
        shown.disable = not shown.console.is_terminal
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def compare_logits(checkpoint: HFCheckpoint, torch_dist: Path) -> None:
    """Run compare_logits.py in a process of its own: it chooses CPU or GPU for all of Megatron.

    Raises ValueError when the logits differ.
    """
    module = "megatron_dft.commands.compare_logits"
    command = [sys.executable, "-m", module, str(checkpoint.path), str(torch_dist)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"--verify: {torch_dist} and {checkpoint.path} do not compute the same")
