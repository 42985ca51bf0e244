"""What a data set depends on beside its rows and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dft.data.overlong import OVERLONG
from megatron_dft.data.reading import Reading
from megatron_dft.data.spec import RowKind


@dataclass(frozen=True)
class DatasetOptions:
    """Options of dataset.build_dataset.

    seq_length        positions in a row, Megatron's --seq-length
    num_samples       how many samples training will take; the order does not depend on it. None:
                      one pass
    packing           several conversations a row; otherwise one a row, padded
    pad_multiple      positions each conversation is padded to: 2 × context-parallel size with
                      context parallelism, else 1
    overlong          "refuse", "drop" or "truncate" (at the end of an assistant turn) conversations
                      that do not fit
    errors            "strict" stops at the first bad row; "skip" leaves out up to max_bad_rows
    cache_dir         where the tokenised data is kept; None keeps it in memory
    data_format       of schema.FORMATS; None: recognised by the columns
    columns, mask_history, max_samples   of reading.Reading
    shuffle           False for validation: each conversation once, in file order; a pass is filled
                      up to batch_multiple (the global batch size) with rows that do not count
    in_order          training data in the order of its files, in every epoch
    template_args     variables of the chat template; template_date: the date that it is told
    rewrites, drops   of spec.REWRITES and spec.DROPS
    workers           tokenising processes; None for one a core
    flag              the command line flag that errors name
    reference_scores  directory of a reference model's log-probabilities of these conversations
                      (reference_scores.py); rows then carry them
    vocab_size        rows of the model's embedding, which every id has to be one of; None where
                      there is no model
    rows              what rows are (spec.RowKind); both answers of a pair share a row, or none is
                      used
    valid_share       this share of each source's rows is held out; held_out_part: the data set is
                      the held-out part, else the rest. One call with each makes a training and a
                      validation set of the same sources

    Raises ValueError (one line) for settings that no data set can have.
    """

    seq_length: int
    num_samples: int | None = None
    seed: int = 0
    packing: bool = True
    pad_multiple: int = 1
    overlong: str = "refuse"
    errors: str = "strict"
    max_bad_rows: float = 0.001
    cache_dir: str | os.PathLike[str] | None = None
    data_format: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    mask_history: bool = False
    max_samples: int | None = None
    shuffle: bool = True
    batch_multiple: int = 1
    in_order: bool = False
    template_args: Mapping[str, Any] | None = None
    template_date: str | None = None
    rewrites: str = "per-turn"
    drops: str = "refuse"
    workers: int | None = None
    progress: bool = False
    flag: str = "--train-data"
    reference_scores: str | os.PathLike[str] | None = None
    vocab_size: int | None = None
    valid_share: float = 0.0
    held_out_part: bool = False
    rows: RowKind = RowKind()

    @property
    def reading(self) -> Reading:
        """Which rows are read, and what a row is."""
        return Reading(
            self.data_format, self.columns, self.mask_history, self.max_samples, self.rows
        )

    def __post_init__(self) -> None:
        if self.seq_length < 1 or self.pad_multiple < 1 or self.seq_length % self.pad_multiple:
            raise ValueError(
                f"--seq-length {self.seq_length} must be a multiple of {self.pad_multiple} (2 × "
                "--context-parallel-size), which each packed conversation is padded to"
            )
        if self.overlong not in OVERLONG:
            raise ValueError(f"--overlong {self.overlong!r}: expected one of {', '.join(OVERLONG)}")
        if self.pairs:
            self._check_pairs()

    @property
    def pairs(self) -> bool:
        """Whether two conversations at a time belong together."""
        return self.rows.name == "pairs"

    def _check_pairs(self) -> None:
        if not self.packing:
            raise ValueError("--no-packing: both answers of a pair share a row; drop the flag")
        if self.overlong == "truncate":
            raise ValueError(
                "--overlong truncate: would cut one answer of a pair; choose drop or refuse"
            )
        if self.data_format is not None:
            raise ValueError(
                f"--data-format {self.data_format}: rows are pairs of chosen and rejected; drop it"
            )
