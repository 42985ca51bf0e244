"""What a training run reports of every micro-batch, in the form that Megatron sums up.

Megatron's loop takes name → [sum, count] and logs Σ sum / Σ count over micro-batches, data- and
context-parallel ranks (training/training.py, train_step and evaluate).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

HISTOGRAM_BINS = 10
HISTOGRAM = "dft/p-histogram/"
TOKENS = "dft/supervised-tokens"
CROSS_ENTROPY = "lm loss"
END_PROB = "dft/end-prob"
ROWS_DROPPED = "dft/rows-dropped"  # share of the supervised tokens, by row_filter.py
SOURCE = "lm loss of "  # and the name of an item of --train-data
# How many tokens a mean of some of them alone is over; not reported.
_COUNT = "number of: "


def histogram_key(index: int) -> str:
    """The report's name for the share of tokens with p in [index/10, (index+1)/10)."""
    return f"{HISTOGRAM}{index}"


@torch.no_grad()
def token_figures(
    objective: str | None,
    cross_entropy: Tensor,
    token_loss: Tensor,
    weight: Tensor,
    mask: Tensor,
    correct: Tensor | None,
    kl: Tensor | None = None,
    ends: Tensor | None = None,
    sources: tuple[Tensor, Sequence[str]] | None = None,
    pairs: tuple[dict[str, Tensor], Tensor] | None = None,
) -> tuple[tuple[str, ...], Tensor]:
    """Names, and sums over the supervised tokens of one micro-batch on one rank, their number last.

    The sums are a new fp32 tensor [names + 1], made in a handful of kernels.

    Args:
        objective: its name, or None in evaluation (then only the plain figures are given).
        cross_entropy, token_loss, weight: fp32 [b, s]; garbage where `mask` is 0 is left out.
        mask: [b, s], 0 or 1.
        correct: bool [b, s], whether the target is the model's first choice; None if not known.
        kl: fp32 [b, s], KL(π_base ‖ π_θ); None without a reference.
        ends: bool [b, s], which supervised tokens end a turn; None if not known.
        sources: (integer [b, s], names): which source a token is of, for the cross entropy of each.
        pairs: (name → sum over pairs, their number), fp32 scalars, in the place of the token loss.
    """
    supervised, p = mask.bool(), (-cross_entropy).exp()
    found = {CROSS_ENTROPY: cross_entropy}
    if objective is not None:
        if objective != "sft" and pairs is None:
            found[f"{objective} loss"] = token_loss
        found["dft/mean-weight"] = weight
    found["dft/mean-prob"] = p
    if correct is not None:
        found["dft/token-accuracy"] = correct
    if kl is not None:
        found["dft/kl"] = kl
    if ends is not None:
        found[END_PROB], found[_COUNT + END_PROB] = torch.where(ends, p, 0.0), ends
    ids, names = sources if sources is not None else (mask, ())
    for number, name in enumerate(names):
        own = ids == number
        found[SOURCE + name] = torch.where(own, cross_entropy, 0.0)
        found[_COUNT + SOURCE + name] = own
    values = torch.stack([*(x.detach().float() for x in found.values()), torch.ones_like(p)])
    parts = [torch.where(supervised, values, 0.0).flatten(1).sum(1)]
    if objective is not None:
        # How many reach each bin's lower edge; a bin is what reaches it and not the next.
        edges = torch.arange(HISTOGRAM_BINS, device=p.device).view(-1, 1, 1)
        reached = ((p * HISTOGRAM_BINS >= edges) & supervised).flatten(1).sum(1).float()
        parts.insert(0, torch.cat([reached[:-1] - reached[1:], reached[-1:]]))
    shares = [histogram_key(i) for i in range(HISTOGRAM_BINS)] if objective is not None else []
    sums = torch.cat(parts)
    of_pairs: dict[str, Tensor] = {}
    if pairs is not None:
        of_pairs = pairs[0] | {_COUNT + name: pairs[1].float() for name in pairs[0]}
        sums = torch.cat([sums[:-1], torch.stack([*of_pairs.values()]), sums[-1:]])
    return (*shares, *found, *of_pairs), sums


def loss_report(
    objective: str | None,
    cross_entropy: Tensor,
    token_loss: Tensor,
    weight: Tensor,
    mask: Tensor,
    correct: Tensor | None,
    kl: Tensor | None = None,
    ends: Tensor | None = None,
    sources: tuple[Tensor, Sequence[str]] | None = None,
    pairs: tuple[dict[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """name → fp32 [sum, count] of one micro-batch on one rank, in the form that Megatron sums up.

    Arguments as of `token_figures`.
    """
    names, sums = token_figures(
        objective, cross_entropy, token_loss, weight, mask, correct, kl, ends, sources, pairs
    )
    report = {name: torch.stack([sums[i], sums[-1]]) for i, name in enumerate(names)}
    for count in [name for name in names if name.startswith(_COUNT)]:
        report[count.removeprefix(_COUNT)][1] = report.pop(count)[0]
    if objective is not None:
        report[TOKENS] = torch.stack([sums[-1], torch.ones_like(sums[-1])])
    return report


class StepFigures:
    """The figures of training steps, kept on the device and reduced over ranks when they are read.

    Reading costs one all-reduce, whatever the number of figures and of steps since the last time.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._open: Tensor | None = None
        self._steps: list[Tensor] = []

    def add(self, names: tuple[str, ...], sums: Tensor) -> None:
        """A micro-batch of the present step, as `token_figures` gives it."""
        assert not self._names or names == self._names, (names, self._names)
        self._names = names
        # Float64: a step's counts stay whole numbers on a thousand ranks too.
        row = torch.cat([sums, sums.new_ones(1)]).double()
        self._open = row if self._open is None else self._open + row

    def close_step(self, keep: bool) -> None:
        """The step has ended; keep: False for one that the optimizer skipped."""
        if self._open is not None and keep:
            self._steps.append(self._open)
        self._open = None

    def take(self, group: dist.ProcessGroup | None) -> tuple[dict[str, Tensor], int]:
        """(name → fp32 mean over tokens of a step, averaged over the steps closed since the last
        call; that number of steps). Collective over `group` where any step was closed.

        TOKENS alone is a sum over the steps, of a micro-batch's mean.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return {}, 0
        table = torch.stack(steps)
        if group is not None:
            dist.all_reduce(table, group=group)
        tokens, micro_batches = table[:, -2], table[:, -1]
        means = (table[:, :-2] / tokens[:, None]).mean(0).float()
        found = dict(zip(self._names, means.unbind(), strict=True))
        for count in [name for name in found if name.startswith(_COUNT)]:
            # Of all such tokens of these steps: a single step may have none.
            del found[count]
            name = count.removeprefix(_COUNT)
            at, number = self._names.index(name), self._names.index(count)
            found[name] = (table[:, at].sum() / table[:, number].sum()).float()
        found[TOKENS] = (tokens / micro_batches).sum().float()
        return found, len(steps)
