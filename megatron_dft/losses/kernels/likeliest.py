"""The k largest logits of a row, found in the lanes that K1 left.

Of the logits that share a lane K1 kept the maximum. The k lanes with the largest maxima hold the k
largest logits (a logit outside them is exceeded or equalled by k maxima), so a row is read again
in those lanes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dft.losses.kernels import statistics
from megatron_dft.losses.kernels.tiles import INFINITY, NO_COLUMN, blocks, device_of, load, wide


# The number of rows changes from batch to batch: no kernel of its own for each kind of it.
@triton.jit(do_not_specialize=["out_row", "lane_count", "ignored"])
def likeliest_kernel(
    z, z_row, z_col, target, exact, lanes, out, found, out_row, vocab_start, vocab, part_size,
    lane_count, ignored,
    TOP: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
    SKIP: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr, ALL: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """One program a row: out [TOP, n] the largest logits, falling, −inf where there are fewer;
    found [TOP, n] their columns in this shard, −1 where there are fewer."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    if SKIP:
        if wanted == ignored:
            return
    z += row * z_row
    number = tl.arange(0, ALL)
    slot = tl.arange(0, SLOTS)
    m = tl.load(lanes + row * lane_count + number, mask=number < lane_count, other=-INFINITY)
    chosen = tl.full([SLOTS], -1, tl.int32)
    for i in range(TOP):
        best = tl.max(m, axis=0)
        place = tl.min(tl.where(m == best, number, NO_COLUMN), axis=0)
        chosen = tl.where(slot == i, tl.where(best > -INFINITY, place, -1), chosen)
        m = tl.where(number == place, -INFINITY, m)
    lane = tl.maximum(chosen, 0)
    part = lane // LANES
    # An empty slot ends before it begins.
    end = tl.where(chosen < 0, 0, tl.minimum((part + 1) * part_size, vocab))
    depth = tl.arange(0, DEEP)
    within = (depth // WIDE) * (LANES * WIDE) + depth % WIDE
    columns = (part * part_size + (lane - part * LANES) * WIDE)[:, None] + within[None, :]
    x = load(z, columns, z_col, end[:, None], UNIT, True).to(tl.float32)
    if EXACT:
        at_target = (columns == (wanted - vocab_start).to(tl.int32)) & (columns < end[:, None])
        x = tl.where(at_target, tl.load(exact + row), x)
    for i in range(TOP):
        best = tl.max(tl.max(x, axis=1), axis=0)
        equal = tl.where(x == best, columns, NO_COLUMN)
        place = tl.min(tl.min(equal, axis=1), axis=0)
        tl.store(out + i * out_row + row, best)
        tl.store(found + i * out_row + row, tl.where(best > -INFINITY, place, -1))
        x = tl.where(columns == place, -INFINITY, x)


def likeliest(
    logits_nV: Tensor,
    target_n: Tensor,
    vocab_start: int,
    top_k: int,
    lanes: Tensor,
    *,
    exact_n: Tensor | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """(k largest logits [k, n] fp32, their columns [k, n] int64, −1 for none) of this shard; the
    lanes and the other arguments as in `part_statistics`. Ignored rows hold anything."""
    rows, vocab = logits_nV.shape
    block = statistics.BLOCK
    per_access = wide(logits_nV)
    _, size = statistics.parts_of(rows, vocab, True)
    out = torch.empty(top_k, rows, dtype=torch.float32, device=logits_nV.device)
    found = torch.empty(top_k, rows, dtype=torch.int64, device=logits_nV.device)
    if not rows:
        return out, found
    with device_of(logits_nV):
        likeliest_kernel[(rows,)](
            logits_nV, *logits_nV.stride(), target_n, out if exact_n is None else exact_n, lanes,
            out, found, rows, vocab_start, vocab, size, lanes.shape[1],
            0 if ignore_index is None else ignore_index,
            TOP=top_k, SLOTS=triton.next_power_of_2(top_k), EXACT=exact_n is not None,
            UNIT=logits_nV.stride(1) == 1, SKIP=ignore_index is not None,
            LANES=block // per_access, WIDE=per_access,
            ALL=triton.next_power_of_2(lanes.shape[1]),
            DEEP=triton.next_power_of_2(blocks(size, block)) * per_access,
            num_warps=statistics.WARPS,
        )  # fmt: skip
    return out, found
