"""Statistics of the parts of a vocabulary → of the whole, and what they say of the target.

Shapes: n rows, S parts (of a row, blocks of a shard, tensor-parallel ranks), C rows of statistics
as losses/vocab_statistics.py lays them out. The arithmetic is that file's `merge` and `finish`, in
one launch in the place of about thirty.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dft.losses.kernels.tiles import INFINITY, LOG2E, blocks, device_of
from megatron_dft.losses.vocab_statistics import Finished, Wanted, entropy_of_top

ROWS = 128


@triton.jit
def _scaled(m, highest):
    """(m − highest, e of that), 0 for a part without a finite logit."""
    empty = m == -INFINITY
    offset = tl.where(empty, 0.0, m - highest)
    return offset, tl.where(empty, 0.0, tl.exp2(offset * LOG2E))


# The number of rows changes from batch to batch: no kernel of its own for each kind of it.
@triton.jit(do_not_specialize=["count", "rows", "ignored"])
def merge_kernel(
    parts, out, target, count, rows, ignored,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, KL: tl.constexpr, TOP: tl.constexpr,
    FINISH: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """parts [S, C, n] → out [C, n]. With FINISH log p is in the place of the target's logit, 1 in
    that of argmax where the target is likeliest, entropy, Σp² and KL in those of their sums."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    C: tl.constexpr = 4 + ENTROPY + SQUARES + TOP + 3 * KL
    R: tl.constexpr = C - 3 * KL
    highest = tl.full([ROWS], -INFINITY, tl.float32)
    highest_r = tl.full([ROWS], -INFINITY, tl.float32)
    part = parts + row
    for _ in range(count):
        highest = tl.maximum(highest, tl.load(part, mask=inside, other=0.0))
        if KL:
            highest_r = tl.maximum(highest_r, tl.load(part + R * rows, mask=inside, other=0.0))
        part += C * rows
    zero = tl.zeros([ROWS], tl.float32)
    sum_exp, found, held = zero, zero, zero
    z_exp, squares, sum_exp_r, cross = zero, zero, zero, zero
    argmax = tl.full([ROWS], INFINITY, tl.float32)
    part = parts + row
    for _ in range(count):
        m = tl.load(part, mask=inside, other=0.0)
        s = tl.load(part + rows, mask=inside, other=0.0)
        offset, scale = _scaled(m, highest)
        sum_exp += scale * s
        chosen = tl.load(part + 2 * rows, mask=inside, other=0.0)
        holds = chosen == chosen  # NaN says that this part does not
        held += tl.where(holds, 1.0, 0.0)
        found += tl.where(holds, chosen, 0.0)
        first = tl.load(part + 3 * rows, mask=inside, other=0.0)
        argmax = tl.minimum(argmax, tl.where(m == highest, first, INFINITY))
        if ENTROPY:
            z_exp += scale * (tl.load(part + 4 * rows, mask=inside, other=0.0) + offset * s)
        if SQUARES:
            own = tl.load(part + (4 + ENTROPY) * rows, mask=inside, other=0.0)
            squares += scale * scale * own
        if KL:
            m_r = tl.load(part + R * rows, mask=inside, other=0.0)
            s_r = tl.load(part + (R + 1) * rows, mask=inside, other=0.0)
            own = tl.load(part + (R + 2) * rows, mask=inside, other=0.0)
            offset_r, scale_r = _scaled(m_r, highest_r)
            sum_exp_r += scale_r * s_r
            cross += tl.where(scale_r == 0.0, 0.0, scale_r * (own + (offset_r - offset) * s_r))
        part += C * rows
    # None, or two (overlapping shards): NaN, never a number.
    chosen = tl.where(held == 1.0, found, float("nan"))
    if FINISH:
        wanted = tl.load(target + row, mask=inside, other=0)
        log_sum = tl.log(sum_exp)
        chosen = (chosen - highest) - log_sum
        argmax = tl.where(argmax == wanted.to(tl.float32), 1.0, 0.0)
        z_exp = log_sum - z_exp / sum_exp
        squares = squares / (sum_exp * sum_exp)
        if KL:
            cross = cross / sum_exp_r - tl.log(sum_exp_r) + log_sum
        if SKIP:
            skipped = wanted == ignored
            chosen = tl.where(skipped, 0.0, chosen)
            argmax = tl.where(skipped, 0.0, argmax)
            z_exp = tl.where(skipped, 0.0, z_exp)
            squares = tl.where(skipped, 0.0, squares)
            cross = tl.where(skipped, 0.0, cross)
    out += row
    tl.store(out, highest, mask=inside)
    tl.store(out + rows, sum_exp, mask=inside)
    tl.store(out + 2 * rows, chosen, mask=inside)
    tl.store(out + 3 * rows, argmax, mask=inside)
    if ENTROPY:
        tl.store(out + 4 * rows, z_exp, mask=inside)
    if SQUARES:
        tl.store(out + (4 + ENTROPY) * rows, squares, mask=inside)
    if KL:
        tl.store(out + R * rows, highest_r, mask=inside)
        tl.store(out + (R + 1) * rows, sum_exp_r, mask=inside)
        tl.store(out + (R + 2) * rows, cross, mask=inside)


def _launch(parts_SCn: Tensor, want: Wanted, target_n: Tensor | None, ignore_index: int | None):
    count, _, rows = parts_SCn.shape
    out = torch.empty_like(parts_SCn[0])
    if rows:
        with device_of(out):
            merge_kernel[(blocks(rows, ROWS),)](
                parts_SCn, out, out if target_n is None else target_n, count, rows,
                0 if ignore_index is None else ignore_index,
                ENTROPY=want.entropy, SQUARES=want.sum_sq_prob, KL=want.kl, TOP=want.top_k,
                FINISH=target_n is not None, SKIP=ignore_index is not None, ROWS=ROWS, num_warps=4,
            )  # fmt: skip
    return out


def merge(parts_SCn: Tensor, want: Wanted, top_kn: Tensor | None = None) -> Tensor:
    """Statistics [C, n] of the union of S parts, contiguous; `top_kn` are its k largest logits, to
    be found among the parts' own if not given."""
    out = parts_SCn[0] if len(parts_SCn) == 1 else _launch(parts_SCn, want, None, None)
    if top_kn is not None or (want.top_k and len(parts_SCn) > 1):
        out[want.rows()["top"]] = _top(parts_SCn, want) if top_kn is None else top_kn
    return out


def _top(parts_SCn: Tensor, want: Wanted) -> Tensor:
    each = parts_SCn[:, want.rows()["top"]]
    return each[0] if len(each) == 1 else each.flatten(0, 1).topk(want.top_k, dim=0).values


def finish(
    parts_SCn: Tensor, target_n: Tensor, want: Wanted, ignore_index: int | None
) -> tuple[Finished, Tensor]:
    """What the merged statistics say, 0 where ignored, and the rows [C, n] that K2 reads."""
    rows = _launch(parts_SCn, want, target_n, ignore_index)
    part = {name: rows[where].squeeze(0) for name, where in want.rows().items()}
    top_prob = top_entropy = None
    if want.top_k:
        top_prob, top_entropy = entropy_of_top(_top(parts_SCn, want))
        if ignore_index is not None:
            top_entropy = torch.where(target_n == ignore_index, 0.0, top_entropy)
    done = Finished(
        maximum=part["max"],
        sum_exp=part["sum_exp"],
        log_prob=part["target"],
        is_top1=part["argmax"] != 0,
        entropy=part["z_exp"] if want.entropy else None,
        sum_sq_prob=part["sq_exp"] if want.sum_sq_prob else None,
        top_prob=top_prob,
        entropy_top=top_entropy,
        kl=part["cross"] if want.kl else None,
        ref_maximum=part["ref_max"] if want.kl else None,
        ref_sum_exp=part["ref_sum_exp"] if want.kl else None,
    )
    return done, rows
