"""Fail on all ranks together: a rank that raises alone leaves the others in a collective."""

from typing import Any

import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; the one value where no process group is up."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None) -> None:
    """Collective. If any rank has an error, every rank raises the first rank's.

    A ValueError (the user's mistake) stays one; anything else becomes a RuntimeError that names the
    rank, raised from this rank's own error if it has one.
    """
    found = (
        None if error is None else (isinstance(error, ValueError), type(error).__name__, str(error))
    )
    for rank, entry in enumerate(gather(found)):
        if entry is not None:
            is_users, kind, text = entry
            if is_users:
                raise ValueError(text) from None
            raise RuntimeError(f"rank {rank}: {kind}: {text}") from error
