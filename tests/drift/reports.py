"""The report of an update, as `megatron-dft drift` makes it."""

from megatron_dft.drift.checkpoint import open_checkpoint
from megatron_dft.drift.compare import Comparison
from megatron_dft.drift.pair import match
from megatron_dft.drift.summary import Summary


def report(base, *tuned, workers=2):
    left, rights = open_checkpoint(base), [open_checkpoint(t) for t in tuned]
    names = match(left, rights[0]).names
    summary = Summary([f"m{i}" for i in range(len(tuned))])
    for tensor in Comparison(left, rights, names, workers).run():
        summary.add(tensor)
    return summary.report(names)
