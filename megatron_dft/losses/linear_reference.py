"""The reference model's logits for a KL term, block of the vocabulary by block.

Shapes: N hidden rows on this rank, T tokens, n supervised tokens, h hidden size, V this rank's rows
of the output layer, B a block of them.
"""

import torch
from torch import Tensor

from megatron_dft.losses.supervised_rows import SupervisedRows


class ReferenceLogits:
    """Logits [n, B] of the supervised rows: of logits that are there, or of hidden states and an
    output layer, whose logits then never exist as a whole. Constant."""

    def __init__(
        self,
        rows: SupervisedRows,
        logits_TV: Tensor | None = None,
        hidden_Nh: Tensor | None = None,
        weight_Vh: Tensor | None = None,
    ) -> None:
        self.rows, self.logits, self.hidden, self.weight = rows, logits_TV, hidden_Nh, weight_Vh
        self.gathered: Tensor | None = None

    @property
    def is_view(self) -> bool:
        """Whether a block takes no memory of its own."""
        return self.logits is not None and self.rows.all

    def begin(self) -> None:
        """Gather the hidden rows, once for a pass over the blocks: a collective."""
        if self.hidden is not None:
            self.gathered = self.rows.gather(self.hidden)

    def end(self) -> None:
        self.gathered = None

    def block(self, block: slice, room: Tensor | None = None) -> Tensor:
        """[n, B], in `room` if there is one and it is not a view of the given logits."""
        if self.logits is not None:
            logits = self.logits[:, block]
            if self.is_view:
                return logits
            return torch.index_select(logits, 0, self.rows.index, out=room)
        assert self.gathered is not None and self.weight is not None
        return torch.mm(self.gathered, self.weight[block].t(), out=room)
