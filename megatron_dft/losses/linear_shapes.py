"""What linear_head.py is given: layouts, limits of memory, and which design serves."""

import dataclasses

import torch
from torch import Tensor

from megatron_dft.losses.row_filter import RowFilter
from megatron_dft.losses.weighting import Objective

DESIGNS = ("auto", "keep", "recompute", "forward")
DEFAULT_CHUNK = 256  # tokens, off a GPU
DEFAULT_MEMORY = 1 << 30  # bytes, on a GPU


@dataclasses.dataclass(frozen=True)
class Layout:
    """Labels [b, s] beside hidden states [s, b, h] or, batch first, [b, s, h]; or [T] and [T, h].

    Rows are taken in the order in which the hidden states lie, so that none is copied. Only the
    `parts` of sequence parallelism follow one another in sequence-first order alone.
    """

    labels: torch.Size
    batch_first: bool = False
    parts: int = 1

    @classmethod
    def of(
        cls, hidden: Tensor, labels: Tensor, parts: int = 1, batch_first: bool = False
    ) -> "Layout":
        """ValueError unless they fit, the hidden states being one of so many parts of the rows."""
        layout = cls(labels.shape, batch_first and labels.dim() == 2, parts)
        if labels.dim() not in (1, 2):
            raise ValueError(f"labels: expected [b, s] or [T], got {tuple(labels.shape)}")
        expected, given = layout.leading(parts), hidden.shape[:-1]
        if given != expected:
            raise ValueError(
                f"hidden: expected the shape {(*expected, hidden.shape[-1])} for labels of shape "
                f"{tuple(labels.shape)}{', batch first' if layout.batch_first else ''}, got "
                f"{tuple(hidden.shape)}; {layout._remedy(given, expected)}"
            )
        return layout

    def _remedy(self, given: torch.Size, expected: torch.Size) -> str:
        if len(given) == 2 and given == expected[::-1]:
            other = "leave out batch_first" if self.batch_first else "give batch_first=True"
            return f"{other}, or hidden.transpose(0, 1), or transpose labels that are [s, b]"
        return "labels are shifted already: the states of ids[:, :-1] go with the labels ids[:, 1:]"

    def leading(self, parts: int = 1) -> torch.Size:
        """The axes before the last of hidden states cut along the sequence into so many parts."""
        if len(self.labels) != 2:
            return torch.Size([n // parts for n in self.labels])
        b, s = self.labels
        return torch.Size((b, s // parts) if self.batch_first else (s // parts, b))

    def check_like_labels(self, name: str, x: Tensor) -> None:
        """ValueError unless x has the labels' shape: [s, b] has as many elements, elsewhere."""
        if x.shape != self.labels:
            turned = x.shape == self.labels[::-1]
            raise ValueError(
                f"{name}: expected the shape {tuple(self.labels)} of labels, got {tuple(x.shape)}"
                + (f"; transpose it: {name}.t()" if turned else "")
            )

    @property
    def _as_labels_lie(self) -> bool:
        return len(self.labels) == 1 or (self.batch_first and self.parts == 1)

    def tokens(self, x: Tensor) -> Tensor:
        """What is [b, s], in the order of the rows, [T]."""
        return (x if self._as_labels_lie else x.t()).reshape(-1)

    def like_labels(self, x: Tensor) -> Tensor:
        """[T] as [b, s]."""
        return x.view(self.labels) if self._as_labels_lie else x.view(self.labels[::-1]).t()

    def rows(self, x: Tensor) -> Tensor:
        """[s, b, h] or [b, s, h] as [T, h]."""
        if self.batch_first and not self._as_labels_lie:
            x = x.transpose(0, 1)
        return x.reshape(-1, x.shape[-1])


def check_weight(hidden: Tensor, weight: Tensor) -> None:
    """ValueError unless the output layer's rows are as wide as the hidden states."""
    wide = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != wide:
        turned = weight.dim() == 2 and weight.shape[0] == wide
        raise ValueError(
            f"weight: expected the shape [V, {wide}], got {tuple(weight.shape)}"
            + ("; transpose it: weight.t()" if turned else "")
        )


def check_reference(
    objective: Objective,
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
) -> None:
    """ValueError where the reference is missing, given twice, or of another shape."""
    given = [logits is not None, reference_hidden is not None, reference_weight is not None]
    if "kl" in objective.needs and not any(given):
        raise ValueError(
            f"--loss {objective.name}: needs the reference model's full distribution, got none; "
            "give reference_logits, or reference_hidden and reference_weight"
        )
    if given not in ([False] * 3, [True, False, False], [False, True, True]):
        raise ValueError(
            "reference_logits: expected either them or both reference_hidden and reference_weight, "
            f"got {given.count(True)} of the three in another combination"
        )
    if logits is not None:
        tokens = layout.leading()
        if logits.shape != (*tokens, len(weight)):
            turned = logits.shape == (*tokens[::-1], len(weight))
            raise ValueError(
                f"reference_logits: expected the shape {(*tokens, len(weight))}, got "
                f"{tuple(logits.shape)}"
                + ("; transpose them: reference_logits.transpose(0, 1)" if turned else "")
            )
    if reference_hidden is not None and reference_weight is not None:
        if reference_hidden.shape[:-1] != hidden.shape[:-1] or len(reference_weight) != len(weight):
            raise ValueError(
                f"reference_hidden: expected {tuple(hidden.shape[:-1])} rows and a weight of "
                f"{len(weight)}, got {tuple(reference_hidden.shape[:-1])} and "
                f"{len(reference_weight)}; give both in the same shards as the model's"
            )


def memory_limits(
    chunk_size: int | None, loss_memory: int | None, real: int, hidden: Tensor, design: str
) -> tuple[int, int]:
    """(most logits that may exist at a time, bytes for them and for what they cost)."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"--loss-chunk-size: expected at least 1 token, got {chunk_size}; 256 is a good start"
        )
    if loss_memory is not None and loss_memory < 1:
        raise ValueError(
            f"--loss-memory: expected at least 1 MiB, got {loss_memory} bytes; 1024 MiB is the "
            "default"
        )
    if chunk_size is None and loss_memory is None:
        chunk_size = None if design == "keep" else DEFAULT_CHUNK
        loss_memory = DEFAULT_MEMORY if design == "keep" else None
    unlimited = 1 << 62
    memory = unlimited if loss_memory is None else loss_memory
    rows = unlimited if chunk_size is None else chunk_size * max(real, 1)
    return min(rows, max(1, memory // hidden.element_size())), memory


def pick_design(
    design: str,
    hidden: Tensor,
    weight: Tensor,
    objective: Objective,
    ranks: int,
    kernels_serve: bool,
    wants_kl: bool,
    row_filter: RowFilter | None,
) -> str:
    """ "auto" resolved; ValueError where the design cannot serve."""
    if design not in DESIGNS:
        raise ValueError(f"design: expected one of {', '.join(DESIGNS)}, got {design!r}")
    possible = ranks == 1 and objective.per_token and not wants_kl and row_filter is None
    # e^{z−m}, on which that design builds, does not outlast the entropy's sum.
    possible = possible and "entropy" not in objective.needs
    if design == "forward" and not possible:
        raise ValueError(
            f"design: expected 'recompute' with {ranks} tensor-parallel ranks and --loss "
            f"{objective.name}, got 'forward', which needs one rank and weights of single tokens, "
            "no entropy, no KL term and no row filter"
        )
    if design == "keep" and not kernels_serve:
        raise ValueError(
            f"design: expected 'recompute' for {hidden.dtype} on {hidden.device.type}, got 'keep', "
            "which needs a GPU, Triton, and bf16, fp16 or fp32"
        )
    if design == "keep" or (design == "auto" and kernels_serve):
        return "keep"
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    wide = hidden.dtype in (torch.float32, torch.float64)
    if possible and differentiated and (design == "forward" or (design == "auto" and wide)):
        return "forward"
    return "recompute"
