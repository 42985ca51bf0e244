"""Counts the collectives that a rank takes part in."""

import collections

import torch.distributed as dist


def count(*names: str) -> collections.Counter:
    """name → calls of that function of torch.distributed, from now to the process's end."""
    calls: collections.Counter = collections.Counter()
    for name in names:
        original = getattr(dist, name)

        def counted(*args, _original=original, _name=name, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    return calls
