"""The problems that are sampled from, and those that choose learning rates.

All are additions of the study's language (`corpus`), each of a seed's problems in all of them.
"""

from collections.abc import Iterable
from typing import Any

import corpus

Row = dict[str, Any]


def problems(demonstrations: Iterable[corpus.Row]) -> list[Row]:
    """Their questions with the right answers, whatever the demonstrations claim.

    The prompt ends with the blank that the answer would begin with: a model's own text has none.
    """
    found = []
    for row in demonstrations:
        _, a1, a0, _, b1, b0, _ = row["prompt"].split()
        right = corpus.addition(int(a1 + a0), int(b1 + b0))
        found.append({"prompt": right["prompt"] + " ", "answer": right["completion"].strip()})
    return found


def validation(count: int) -> list[corpus.Row]:
    """Problems that choose learning rates: in no training, and not among those that score."""
    return [corpus.addition(a, b) for a, b in corpus.held_out_sums()[-count:]]
