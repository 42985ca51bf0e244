"""A worker's buffers, and the reading of a tensor block by block into them as float32."""

from collections.abc import Iterator

import numpy as np
import torch

from megatron_dft.drift.checkpoint import Checkpoint, TensorReader
from megatron_dft.drift.moments import BLOCK, BlockStatistics

TASK = 1 << 21  # elements: a worker takes up tensors until it has as many


class Blocks:
    """One thread's buffers: a stored-dtype and a float32 block for each checkpoint."""

    def __init__(self, checkpoints: int):
        self.statistics = BlockStatistics()
        self.raw = torch.empty(8 * BLOCK, dtype=torch.uint8)
        self.float = [torch.empty(BLOCK) for _ in range(checkpoints)]
        self.delta = [torch.empty(BLOCK) for _ in range(checkpoints - 1)]
        self.changed = np.empty((checkpoints - 1, BLOCK), dtype=bool)
        self.near_zero = np.empty(BLOCK, dtype=bool)
        self._whole = torch.empty(TASK)

    def whole(self, count: int) -> torch.Tensor:
        """float32 [count] for a whole tensor, until the next call.

        Reused where it is small; numpy asks for huge pages: both spare thousands of page faults.
        """
        if count <= len(self._whole):
            return self._whole[:count]
        return torch.from_numpy(np.empty(count, np.float32))

    def read(
        self, reader: TensorReader, dtype: torch.dtype, start: int, out: torch.Tensor
    ) -> torch.Tensor:
        """Elements from `start` as float32 in `out` (float64 tensors: a new float64 block)."""
        if dtype == torch.float32:
            reader.read(start, out)
            return out
        raw = self.raw.view(dtype)[: out.numel()]
        reader.read(start, raw)
        if dtype == torch.float64:
            return raw.clone()
        return out.copy_(raw)

    def stream(self, checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
        """The tensor's elements as float32 blocks, each valid until the next."""
        reader, info = checkpoint.open(name), checkpoint.tensors[name]
        for start in range(0, info.numel, BLOCK):
            out = self.float[0][: min(BLOCK, info.numel - start)]
            yield self.read(reader, info.dtype, start, out).float()
