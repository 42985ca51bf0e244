"""A command line that must be refused before a model is built."""

import contextlib
import io

from tests.ranks import run_ranks


def refused(world_size: int, argv: list[str]) -> list[tuple[int, str]]:
    """(exit status, standard error) of training on each rank; building a model fails the test."""
    return run_ranks(_rank, world_size, argv, init=False)


def _rank(argv: list[str]) -> tuple[int, str]:
    from megatron_dft import train
    from megatron_dft.training import model

    def built(*args, **kwargs):
        raise AssertionError("a model was built")

    model.model_config = built
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            status = train.main(argv)
        except SystemExit as exit:  # argparse
            status = int(exit.code or 0)
    return status, text.getvalue()
