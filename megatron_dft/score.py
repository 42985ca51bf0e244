"""Score the training data once with the reference model, so that training need not hold it.

    megatron-dft score --nproc-per-node 8 TRAINING FLAGS --dft-reference-scores DIR
    megatron-dft train --nproc-per-node 8 TRAINING FLAGS --dft-reference-scores DIR

What is scored is the model of --hf-model, or Megatron's checkpoint where --load finds one (psft's
old policy); the scores serve every layout. A killed run goes on behind the last stored segment.
"""

from collections.abc import Sequence
from typing import Any

from megatron_dft.storage import terminal

if __name__ == "__main__":  # before the imports that warn
    terminal.divert()

from megatron_dft.training.launch import launch
from megatron_dft.training.log_file import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Score the data that the flags name; returns the exit status, 2 for a user's mistake."""
    return launch(argv, _prepare, _score, scoring=True)


# Not imported earlier: importing Megatron has to find the device chosen.
def _prepare(args: Any) -> None:
    from megatron_dft.training import scoring

    scoring.prepare(args)


def _score(args: Any) -> None:
    from megatron_dft.training import scoring

    scoring.score(args)


if __name__ == "__main__":
    run_program(main)
