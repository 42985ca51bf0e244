"""The directories that a run writes to, held against every other run for as long as it lives."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dft.data.reference_scores import FLAG
from megatron_dft.flags import output
from megatron_dft.hf import directory
from megatron_dft.storage.lock import held


@contextlib.contextmanager
def owned(args: Any, scoring: bool) -> Iterator[None]:
    """Hold --save, --save-hf and, in a scoring run, the directory of the scores.

    For the first rank, after every other refusal: what stands there is written or mended under it.

    Raises ValueError where another run holds one, or where it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if args.save is not None:
            stack.enter_context(held("--save", Path(args.save)))
        if args.save_hf is not None:
            stack.enter_context(held("--save-hf", Path(args.save_hf), beside=True))
            directory.heal(Path(args.save_hf))
            output.refuse_filled(args)
        if scoring:
            stack.enter_context(held(FLAG, Path(args.dft_reference_scores)))
        yield
