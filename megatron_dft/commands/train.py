"""`megatron-dft train`: fine-tune on this machine, in one process or on --nproc-per-node ranks."""

from collections.abc import Sequence

from megatron_dft.commands import launcher


def main(words: Sequence[str]) -> int:
    """megatron_dft.train on each rank; returns its exit status, 2 for a user's mistake."""
    return launcher.main("megatron_dft.train", words)
