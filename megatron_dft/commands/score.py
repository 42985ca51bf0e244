"""`megatron-dft score`: the reference's scores of the training data, on --nproc-per-node ranks."""

from collections.abc import Sequence

from megatron_dft.commands import launcher


def main(words: Sequence[str]) -> int:
    """megatron_dft.score on each rank; returns its exit status, 2 for a user's mistake."""
    return launcher.main("megatron_dft.score", words)
