"""Training runs on the fork server that may end before their last step, and their checkpoints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.train import listener

Rows = dict[tuple[int, int], list[int]]


class Ended:
    """How a run ended on each rank: statuses, figures of each step, rows, status word, output."""

    def __init__(self, results: list[Any], status: Path) -> None:
        self.codes = [code for code, *_ in results]
        self.steps = results[-1][1]
        self.texts = [text for _, _, text, _ in results]
        # (rank, step) → checksums of its rows, in the order of training
        self.rows: Rows = {
            (rank, step): rows
            for rank, (*_, given) in enumerate(results)
            for step, rows in given.items()
        }
        self.word = status.read_text().split()[0] if status.exists() else None


def rows_of_steps(rows: Rows) -> dict[int, list[int]]:
    """step → its global batch, each row once: the same in every layout."""
    steps = {step for _, step in rows}
    return {
        n: sorted({r for (_, step), rs in rows.items() if step == n for r in rs}) for n in steps
    }


def _rank(argv, before, status):
    import io
    import sys

    os.environ["MEGATRON_DFT_STATUS"] = status
    text = io.StringIO()

    class Tee:
        def __init__(self, stream):
            self.stream = stream

        def write(self, words):
            text.write(words)
            return self.stream.write(words)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    sys.stdout, sys.stderr = Tee(sys.stdout), Tee(sys.stderr)
    from megatron_dft import train

    heard: list[dict[str, float]] = []
    given: dict[int, list[int]] = {}
    listener.on_figures(heard.append)
    listener.on_rows(lambda step, rows: given.setdefault(step, []).extend(rows))
    if before is not None:
        before()
    try:
        code = train.main(argv)
    except SystemExit as leaving:
        code = leaving.code
    return code, heard, text.getvalue(), given


def run(
    world_size: int, *argv: str, status: Path, before: Callable[[], None] | None = None
) -> Ended:
    """Train on `world_size` ranks; `before` runs on each first, to break a part."""
    status.unlink(missing_ok=True)
    results = run_ranks(_rank, world_size, list(argv), before, str(status), init=False, timeout=240)
    return Ended(results, status)


def tensors(directory: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint (weights, Adam state, random states), by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(directory))
    metadata = reader.read_metadata()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit-equal weights and optimizer state.

    The buckets of the distributed optimizer's layout-bound format are left out: between parameters
    they hold padding that was never written.
    """
    a, b = (
        {k: v for k, v in tensors(path).items() if not k.startswith("optimizer.distributed.dp")}
        for path in (one, other)
    )
    assert a.keys() == b.keys() and a
    different = {
        name: (a[name] != b[name]).nonzero()[:3].tolist()
        for name in a
        if not torch.equal(a[name], b[name])
    }
    assert not different, different
