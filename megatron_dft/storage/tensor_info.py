"""What is known of a stored tensor before its data is read."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape (global, never a shard's) and stored dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize
