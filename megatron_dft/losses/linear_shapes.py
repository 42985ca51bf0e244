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
    """Megatron's [b, s] labels beside [s, b, h] hidden states, or [T] beside [T, h]."""

    labels: torch.Size

    @classmethod
    def of(cls, hidden: Tensor, labels: Tensor, parts: int) -> "Layout":
        """ValueError unless they fit, the hidden states being one of so many parts of the rows."""
        expected = labels.shape if labels.dim() == 1 else (labels.shape[1], labels.shape[0])
        expected = (expected[0] // parts, *expected[1:])
        if hidden.shape[:-1] != torch.Size(expected) or labels.dim() > 2:
            raise ValueError(
                f"hidden: expected the shape {(*expected, hidden.shape[-1])} for labels of shape "
                f"{tuple(labels.shape)}, got {tuple(hidden.shape)}"
            )
        return cls(labels.shape)

    def tokens(self, x: Tensor) -> Tensor:
        """[b, s] in the order of the hidden states, [s·b]."""
        return x.reshape(-1) if x.dim() == 1 else x.t().reshape(-1)

    def like_labels(self, x: Tensor) -> Tensor:
        """[s·b] as [b, s]."""
        return x if len(self.labels) == 1 else x.view(self.labels[1], self.labels[0]).t()

    def rows(self, x: Tensor) -> Tensor:
        """[s, b, h] as [s·b, h]."""
        return x.reshape(-1, x.shape[-1])


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
        tokens = layout.labels if len(layout.labels) == 1 else layout.labels[::-1]
        if logits.shape != (*tokens, len(weight)):
            raise ValueError(
                f"reference_logits: expected the shape {(*tokens, len(weight))}, got "
                f"{tuple(logits.shape)}"
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
