"""Softmax statistics over a sharded vocabulary: of one shard, merged over shards, and gradients.

Shapes: T tokens, V this shard's vocabulary, S shards, C rows of statistics. A shard is a rank's
part of the vocabulary or a block of such a part: both merge in the same way.

A shard's statistics are a [C, T] fp32 tensor (fp64 for fp64 logits). With z the logits, m their
maximum in the shard, r the reference logits and m_r theirs, its rows are

    max m · sum_exp Σe^{z−m} · target z_y, NaN unless the shard holds the target
    argmax id of the first token with z = m; below 2^24, where fp32 has every integer
    z_exp Σe^{z−m}(z−m)        for the entropy
    sq_exp Σe^{2(z−m)}         for Σp²
    top k largest z            for the entropy of the k likeliest tokens
    ref_max m_r · ref_sum_exp Σe^{r−m_r} · cross Σe^{r−m_r}((r−m_r) − (z−m))   for the KL

so that one all-gather of that tensor is all the communication that any of them needs.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

# e^-200 is 0 in fp32, and 0 · −200 is 0 where 0 · −inf would be NaN.
LOWEST = -200.0
# On a CPU, large enough that the threads' barriers cost little on a busy machine too (4 MiB, which
# stays in cache, ran 10 times slower on one); on a GPU, few enough kernel launches.
CPU_CHUNK_BYTES = 32 << 20
GPU_CHUNK_BYTES = 256 << 20
SEARCH_BYTES = 2048  # of a row that the first maximum is looked for in: measured, fp32 and bf16


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which statistics beyond the target's log-probability are computed.

    `reference_share` η in (0, 1]: the KL's reference is softmax((1 − η)·z + η·z_ref) of the logits
    z and z_ref, ∝ π_θ^(1−η)·π_ref^η, a constant; mixed in the statistics' dtype.
    """

    entropy: bool = False
    sum_sq_prob: bool = False
    top_k: int = 0
    kl: bool = False
    reference_share: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether the model has a part in the KL's reference."""
        return self.kl and self.reference_share < 1.0

    def rows(self) -> dict[str, slice]:
        """Where each statistic lies in the C rows."""
        sizes = {
            "max": 1,
            "sum_exp": 1,
            "target": 1,
            "argmax": 1,
            "z_exp": int(self.entropy),
            "sq_exp": int(self.sum_sq_prob),
            "top": self.top_k,
            "ref_max": int(self.kl),
            "ref_sum_exp": int(self.kl),
            "cross": int(self.kl),
        }
        rows, start = {}, 0
        for name, size in sizes.items():
            rows[name] = slice(start, start + size)
            start += size
        return rows

    @property
    def count(self) -> int:
        """C, the number of rows."""
        return self.rows()["cross"].stop


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_chunks(tokens: int, vocab: int, chunk_bytes: int | None, device: torch.device) -> Iterator:
    """Slices of tokens whose fp32 logits take about `chunk_bytes`."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    step = max(1, chunk_bytes // (4 * max(vocab, 1)))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def target_position(target_T: Tensor, vocab_start: int, vocab: int) -> tuple[Tensor, Tensor]:
    """(whether this shard holds the target [T] bool, its column, 0 where it does not [T] int64)."""
    column = target_T - vocab_start
    held = (column >= 0) & (column < vocab)
    return held, torch.where(held, column, 0)


def _first_maximum(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum [T], its first column [T] int64): `max(-1)` of a CPU takes eight times as long."""
    vocab, size = logits_TV.shape[1], SEARCH_BYTES // logits_TV.element_size()
    if vocab <= 2 * size:
        return logits_TV.max(-1)
    blocks = vocab // size
    whole = logits_TV[:, : blocks * size].unflatten(1, (blocks, size))
    maximum, block = whole.amax(-1).max(1)
    near = whole[torch.arange(len(block), device=block.device), block]
    column = block * size + _first(near, maximum)
    rest = logits_TV[:, blocks * size :]
    if not rest.shape[1]:
        return maximum, column
    last = rest.amax(-1)
    beyond = last > maximum
    column = torch.where(beyond, blocks * size + _first(rest, last), column)
    return torch.where(beyond, last, maximum), column


def _first(values_TB: Tensor, wanted_T: Tensor) -> Tensor:
    """The first column that holds the value."""
    return (values_TB == wanted_T.unsqueeze(1)).to(torch.uint8).argmax(1)


def _shift(logits_TV: Tensor, maximum_T: Tensor, buffer_TV: Tensor) -> Tensor:
    """z − m in the buffer; a shard without a finite logit is left at z."""
    safe = torch.where(maximum_T == -torch.inf, 0.0, maximum_T)
    return torch.sub(logits_TV, safe.unsqueeze(-1), out=buffer_TV)


def mixed_reference(logits: Tensor, reference: Tensor, share: float) -> Tensor:
    """(1 − η)·z + η·z_ref in the statistics' dtype, η = `share`; z_ref as it is where η is 1."""
    if share == 1.0:
        return reference
    wide = statistics_dtype(logits)
    return reference.to(wide).mul(share).add_(logits.to(wide), alpha=1.0 - share)


def shard_statistics(
    logits_TV: Tensor,
    target_T: Tensor,
    vocab_start: int,
    want: Wanted,
    buffer_TV: Tensor,
    reference_TV: Tensor | None = None,
) -> Tensor:
    """Statistics [C, T] of a chunk of one shard's logits.

    `buffer_TV` (statistics dtype) is overwritten, with e^{z−m} unless the entropy is wanted; it may
    be `logits_TV` itself, which is then lost.
    """
    tokens, vocab = logits_TV.shape
    rows = want.rows()
    if reference_TV is not None:  # first: the buffer may be the logits' own storage
        reference_TV = mixed_reference(logits_TV, reference_TV, want.reference_share)
    out = buffer_TV.new_full((want.count, tokens), 0.0)
    out[rows["top"]] = -torch.inf
    if vocab == 0:
        out[rows["max"]] = out[rows["ref_max"]] = -torch.inf
        out[rows["target"]] = torch.nan
        out[rows["argmax"]] = torch.inf
        return out
    held, column = target_position(target_T, vocab_start, vocab)
    target_logit = logits_TV.gather(1, column.unsqueeze(1)).squeeze(1).to(out.dtype)
    out[rows["target"]] = torch.where(held, target_logit, torch.nan)
    if want.top_k:
        k = min(want.top_k, vocab)
        out[rows["top"]][:k] = logits_TV.topk(k, dim=-1).values.T.to(out.dtype)
    largest, column = _first_maximum(logits_TV)
    maximum = largest.to(out.dtype)
    out[rows["max"]] = maximum
    out[rows["argmax"]] = (column + vocab_start).to(out.dtype)
    shifted = _shift(logits_TV, maximum, buffer_TV)
    if want.kl:
        assert reference_TV is not None
        ref_maximum = reference_TV.amax(-1).to(out.dtype)
        ref_shifted = _shift(reference_TV, ref_maximum, torch.empty_like(buffer_TV))
        ref_exp = ref_shifted.exp()
        # A token that the reference excludes adds nothing, whatever the model says of it.
        difference = (ref_shifted - shifted).masked_fill_(ref_exp == 0, 0.0)
        out[rows["ref_max"]] = ref_maximum
        out[rows["ref_sum_exp"]] = ref_exp.sum(-1)
        out[rows["cross"]] = ref_exp.mul_(difference).sum(-1)
    if want.entropy:
        shifted.clamp_(min=LOWEST)
        exp = shifted.exp()
        out[rows["z_exp"]] = shifted.mul_(exp).sum(-1)
    else:
        exp = shifted.exp_()
    out[rows["sum_exp"]] = exp.sum(-1)
    if want.sum_sq_prob:
        out[rows["sq_exp"]] = torch.linalg.vector_norm(exp, dim=-1).square_()
    return out


def _rescaled(maxima_ST: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(overall maximum [T], m_s − overall [S, T], e of that [S, T]); a shard without a finite logit
    has 0 for both."""
    overall = maxima_ST.amax(0)
    empty = maxima_ST == -torch.inf
    offset = torch.where(empty, 0.0, maxima_ST - overall)
    return overall, offset, torch.where(empty, 0.0, offset.exp())


def merge(stats_SCT: Tensor, want: Wanted) -> Tensor:
    """Statistics [C, T] of the union of S shards."""
    rows = want.rows()
    part = {name: stats_SCT[:, where] for name, where in rows.items()}
    out = torch.empty_like(stats_SCT[0])
    overall, offset, scale = _rescaled(part["max"].squeeze(1))
    sum_exp = part["sum_exp"].squeeze(1)
    out[rows["max"]] = overall
    out[rows["sum_exp"]] = (scale * sum_exp).sum(0)
    # Exactly one shard may hold a target. None, or two (overlapping shards): NaN, never a number.
    target = part["target"].squeeze(1)
    held = ~target.isnan()
    found = torch.where(held, target, 0.0).sum(0)
    out[rows["target"]] = torch.where(held.sum(0) == 1, found, torch.nan)
    # Ties between shards go to the lower id as well.
    leads = part["max"] == overall
    out[rows["argmax"]] = torch.where(leads, part["argmax"], torch.inf).amin(0)
    if want.entropy:
        out[rows["z_exp"]] = (scale * (part["z_exp"].squeeze(1) + offset * sum_exp)).sum(0)
    if want.sum_sq_prob:
        out[rows["sq_exp"]] = (scale.square() * part["sq_exp"].squeeze(1)).sum(0)
    if want.top_k:
        out[rows["top"]] = part["top"].flatten(0, 1).topk(want.top_k, dim=0).values
    if want.kl:
        ref_overall, ref_offset, ref_scale = _rescaled(part["ref_max"].squeeze(1))
        ref_sum = part["ref_sum_exp"].squeeze(1)
        cross = part["cross"].squeeze(1) + (ref_offset - offset) * ref_sum
        out[rows["ref_max"]] = ref_overall
        out[rows["ref_sum_exp"]] = (ref_scale * ref_sum).sum(0)
        out[rows["cross"]] = torch.where(ref_scale == 0, 0.0, ref_scale * cross).sum(0)
    return out


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the merged statistics say, [T] each; None where not wanted."""

    maximum: Tensor
    sum_exp: Tensor
    log_prob: Tensor
    is_top1: Tensor  # bool: greedy decoding takes the target, the first of equally likely tokens
    entropy: Tensor | None = None
    sum_sq_prob: Tensor | None = None
    top_prob: Tensor | None = None  # [k, T], renormalised over the k likeliest
    entropy_top: Tensor | None = None
    kl: Tensor | None = None
    ref_maximum: Tensor | None = None
    ref_sum_exp: Tensor | None = None


def entropy_of_top(top_kT: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities [k, T] of these logits among themselves, their entropy [T])."""
    log_prob = top_kT.log_softmax(0).clamp(min=LOWEST)
    prob = log_prob.exp()
    return prob, -(prob * log_prob).sum(0)


def finish(stats_CT: Tensor, target_T: Tensor, want: Wanted) -> Finished:
    """Probabilities, entropies and divergences of merged statistics."""
    part = {name: stats_CT[where].squeeze(0) for name, where in want.rows().items()}
    maximum, sum_exp = part["max"], part["sum_exp"]
    log_sum = sum_exp.log()
    entropy = sum_sq_prob = top_prob = entropy_top = kl = ref_maximum = ref_sum_exp = None
    if want.entropy:
        entropy = log_sum - part["z_exp"] / sum_exp
    if want.sum_sq_prob:
        sum_sq_prob = part["sq_exp"] / sum_exp.square()
    if want.top_k:
        top_prob, entropy_top = entropy_of_top(stats_CT[want.rows()["top"]])
    if want.kl:
        ref_maximum, ref_sum_exp = part["ref_max"], part["ref_sum_exp"]
        kl = part["cross"] / ref_sum_exp - ref_sum_exp.log() + log_sum
    return Finished(
        maximum=maximum,
        sum_exp=sum_exp,
        log_prob=(part["target"] - maximum) - log_sum,
        is_top1=part["argmax"] == target_T,
        entropy=entropy,
        sum_sq_prob=sum_sq_prob,
        top_prob=top_prob,
        entropy_top=entropy_top,
        kl=kl,
        ref_maximum=ref_maximum,
        ref_sum_exp=ref_sum_exp,
    )
