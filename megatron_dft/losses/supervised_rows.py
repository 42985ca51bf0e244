"""The supervised rows of hidden states: compacted, gathered and reduced over tensor-parallel ranks.

Shapes: N hidden rows on this rank, T tokens of the micro-batch (N = T/tp with sequence parallelism,
else T), n supervised tokens among them, h hidden size. Tokens are in Megatron's order, sequence
before batch, so that rank r of sequence parallelism holds tokens r·N … (r+1)·N − 1.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on `device`; from host memory to a GPU by a copy that the host does not wait for.

    A plain `.to` waits until the GPU has done all that was launched before.
    """
    if values.is_cpu and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class SupervisedRows:
    """Moves hidden states in and their gradients out; only supervised rows travel.

    Every rank of `group` has to hold the same `supervised_T` (bool). Building one costs a device
    synchronisation, for the counts set the shapes; none where it is in host memory.
    """

    def __init__(
        self,
        supervised_T: Tensor,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        device: torch.device | None = None,
    ) -> None:
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel and self.ranks > 1
        self.tokens = len(supervised_T)
        index = supervised_T.nonzero().squeeze(1)
        self.index = index if device is None else on_device(index, device)
        self.all = len(self.index) == self.tokens
        if self.sequence_parallel:
            assert group is not None
            if self.tokens % self.ranks:
                raise ValueError(
                    f"labels: with sequence parallelism expected a number of tokens divisible by "
                    f"{self.ranks} tensor-parallel ranks, got {self.tokens}; pad the sequence"
                )
            self.counts: list[int] = supervised_T.view(self.ranks, -1).sum(1).tolist()
            rank, local = dist.get_rank(group), self.tokens // self.ranks
            start = sum(self.counts[:rank])
            self.local_index = self.index[start : start + self.counts[rank]] - rank * local

    def of(self, values_T: Tensor) -> Tensor:
        """[n] of per-token values [T]."""
        return values_T if self.all else values_T[self.index]

    def spread(self, values_n: Tensor) -> Tensor:
        """[T] of [n]: 0 where not supervised; a new tensor."""
        if self.all:
            return values_n.clone()
        return values_n.new_zeros(self.tokens).index_copy_(0, self.index, values_n)

    def gather(self, hidden_Nh: Tensor) -> Tensor:
        """Supervised rows [n, h] of all ranks; one all-gather with sequence parallelism.

        A view where nothing has to be left out.
        """
        return self.start_gather(hidden_Nh)()

    def start_gather(self, hidden_Nh: Tensor) -> Callable[[], Tensor]:
        """Begin `gather`; what is returned waits for its result."""
        if not self.sequence_parallel:
            rows = hidden_Nh if self.all else hidden_Nh.index_select(0, self.index)
            return lambda: rows
        most = max(self.counts)
        hidden = hidden_Nh.shape[1]
        sent = hidden_Nh.new_zeros(most, hidden)
        torch.index_select(hidden_Nh, 0, self.local_index, out=sent[: len(self.local_index)])
        gathered = hidden_Nh.new_empty(self.ranks * most, hidden)
        work = None
        if most:
            work = dist.all_gather_into_tensor(gathered, sent, group=self.group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            if min(self.counts) == most:
                return gathered
            parts = gathered.view(self.ranks, most, hidden)
            return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

        return finish

    def reduce(self, gradient_nh: Tensor) -> Tensor:
        """Gradient [N, h] of this rank's hidden rows from every rank's [n, h]; that may be lost.

        One all-reduce, or one reduce-scatter with sequence parallelism.
        """
        return self.start_reduce(gradient_nh)()

    def start_reduce(self, gradient_nh: Tensor) -> Callable[[], Tensor]:
        """Begin `reduce`; what is returned waits for its result. The argument is busy till then."""
        hidden = gradient_nh.shape[1]
        if not self.sequence_parallel:
            work = None
            if self.ranks > 1:
                work = dist.all_reduce(gradient_nh, group=self.group, async_op=True)

            def finish() -> Tensor:
                if work is not None:
                    work.wait()
                if self.all:
                    return gradient_nh
                out = gradient_nh.new_zeros(self.tokens, hidden)
                return out.index_copy_(0, self.index, gradient_nh)

            return finish
        return self._start_scatter(gradient_nh)

    def _start_scatter(self, gradient_nh: Tensor) -> Callable[[], Tensor]:
        most, hidden = max(self.counts), gradient_nh.shape[1]
        out = gradient_nh.new_zeros(self.tokens // self.ranks, hidden)
        if not most:
            return lambda: out
        sent = gradient_nh
        if min(self.counts) < most:
            sent = gradient_nh.new_zeros(self.ranks, most, hidden)
            for row, part in zip(sent, gradient_nh.split(self.counts), strict=True):
                row[: len(part)] = part
        received = gradient_nh.new_empty(most, hidden)
        work = dist.reduce_scatter_tensor(
            received, sent.reshape(-1, hidden), group=self.group, async_op=True
        )

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return out.index_copy_(0, self.local_index, received[: len(self.local_index)])

        return finish
