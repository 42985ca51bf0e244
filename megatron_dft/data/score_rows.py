"""The rows in which a segment of conversations is scored, dealt to data-parallel replicas."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from megatron_dft.data.dataset import ChatDataset
from megatron_dft.data.rows import row_spans


class SegmentRows:
    """Micro-batches of this replica; all replicas together see each conversation once.

    Micro-batch m of replica d holds the rows (m · size + d) · b … + b − 1 of the segment, filled up
    with empty rows, so that every replica runs equally many (expert parallelism needs that).

    Args:
        data: the training data; its row settings are used.
        numbers: the segment's conversations. micro_batch_size: b. replica: d of `size`.

    Attributes:
        micro_batches: of each replica.
    """

    def __init__(
        self,
        data: ChatDataset,
        numbers: range,
        micro_batch_size: int,
        replica: int,
        size: int,
    ) -> None:
        self._data, self._micro_batch_size = data, micro_batch_size
        self._replica, self._size = replica, size
        self._rows = data.plan.rows_of(np.asarray(numbers, dtype=np.int64))
        self.micro_batches = -(-len(self._rows) // (micro_batch_size * size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self._micro_batch_size
        for number in range(self.micro_batches):
            first = (number * self._size + self._replica) * step
            rows = [self._row(i) for i in range(first, first + step)]
            yield default_collate(rows)

    def _row(self, index: int) -> dict[str, Tensor]:
        return self._data.row(self._rows[index] if index < len(self._rows) else [])

    def split(self, values: Tensor) -> dict[int, np.ndarray]:
        """Conversation → its values, float32 [n − 1], of the rows' [at least rows, S]."""
        found = {}
        for members, row in zip(self._rows, values.numpy(), strict=False):
            counts = [len(self._data.conversations[m]) - 1 for m in members]
            spans = row_spans(counts, self._data.pad_multiple)
            for member, count, (at, _) in zip(members, counts, spans, strict=True):
                found[member] = row[at : at + count]
        return found
