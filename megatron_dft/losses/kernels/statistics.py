"""K1: the statistics of a shard's logits in one read.

Shapes: n rows, V columns of this shard, P parts into which a row is split where rows are few, C
rows of statistics as losses/vocab_statistics.py lays them out. Each of a part's lanes keeps a
maximum of its own, rescaled once for the WIDE logits of an access, so that a logit costs one
exponential; the lanes meet when the row is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dft.losses.kernels.tiles import (
    INFINITY,
    LOG2E,
    LOWEST,
    NO_COLUMN,
    blocks,
    device_of,
    guided,
    load,
    tile_columns,
    wide,
)
from megatron_dft.losses.vocab_statistics import Wanted

BLOCK = 4096  # logits of a tile
WARPS = 8
# Enough programs for every processor of a GPU to hold several.
PROGRAMS = 2048
# Tiles of a part when its lanes are to be searched for the k largest: bounds the search.
SEARCHED_TILES = 16


@triton.jit
def _fold(
    x, r, start, m, s, first, u, q, mr, sr, cross,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Add a tile of logits x (and reference logits r) to the lanes' accumulators.

    m maximum, s Σe^{x−m}, first tile that holds m, u Σe^{x−m}(x−m), q Σe^{2(x−m)}; mr and sr of
    the reference, cross Σe^{r−mr}((r−mr) − (x−m)).
    """
    highest = tl.max(x, axis=1)
    first = tl.where(highest > m, start, first)
    new = tl.maximum(m, highest)
    safe = tl.where(new == -INFINITY, 0.0, new)
    offset = tl.where(m == -INFINITY, 0.0, m - safe)
    scale = tl.exp2(offset * LOG2E)
    shifted = x - safe[:, None]
    e = tl.exp2(shifted * LOG2E)
    if ENTROPY:
        u = scale * (u + offset * s) + tl.sum(e * tl.maximum(shifted, LOWEST), axis=1)
    if SQUARES:
        q = scale * scale * q + tl.sum(e * e, axis=1)
    if KL:
        new_r = tl.maximum(mr, tl.max(r, axis=1))
        safe_r = tl.where(new_r == -INFINITY, 0.0, new_r)
        offset_r = tl.where(mr == -INFINITY, 0.0, mr - safe_r)
        scale_r = tl.exp2(offset_r * LOG2E)
        shifted_r = r - safe_r[:, None]
        er = tl.exp2(shifted_r * LOG2E)
        # What the reference excludes adds nothing, whatever the model says of it.
        difference = tl.where(er == 0.0, 0.0, shifted_r - shifted)
        carried = tl.where(scale_r == 0.0, 0.0, scale_r * (cross + (offset_r - offset) * sr))
        cross = carried + tl.sum(er * difference, axis=1)
        sr = scale_r * sr + tl.sum(er, axis=1)
        mr = new_r
    s = scale * s + tl.sum(e, axis=1)
    return new, s, first, u, q, mr, sr, cross


@triton.jit
def _lanes_to_one(m):
    """(maximum of the lanes, m − maximum, e of that); a lane without a finite logit has 0."""
    highest = tl.max(m, axis=0)
    empty = m == -INFINITY
    offset = tl.where(empty, 0.0, m - tl.where(highest == -INFINITY, 0.0, highest))
    return highest, offset, tl.where(empty, 0.0, tl.exp2(offset * LOG2E))


# The number of rows changes from batch to batch: no kernel of its own for each kind of it.
@triton.jit(do_not_specialize=["out_row", "ignored", "share"])
def statistics_kernel(
    z, z_row, z_col, r, r_row, r_col, target, exact, out, out_row, lanes,
    vocab_start, vocab, part_size, parts, ignored, share,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, KL: tl.constexpr, TOP: tl.constexpr,
    EXACT: tl.constexpr, Z_UNIT: tl.constexpr, R_UNIT: tl.constexpr, SKIP: tl.constexpr,
    GUIDED: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a row and part: z [n, V] → out [parts, C, n], and with TOP the lanes' maxima
    [n, parts · LANES]."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    part = program % parts
    wanted = tl.load(target + row)
    if SKIP:
        if wanted == ignored:
            return
    z += row * z_row
    r += row * r_row
    BLOCK: tl.constexpr = LANES * WIDE
    begin = part * part_size
    end = tl.minimum(begin + part_size, vocab)
    column = (wanted - vocab_start).to(tl.int32)
    held = (column >= begin) & (column < end)
    chosen = tl.load(
        z + tl.where(held, column, 0).to(tl.int64) * z_col, mask=held, other=float("nan")
    ).to(tl.float32)
    if EXACT:
        chosen = tl.where(held, tl.load(exact + row), float("nan"))
    # Another part's column may lie in the masked end of this one's last tile.
    column = tl.where(held, column, -1)

    m = tl.full([LANES], -INFINITY, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.int32) + begin
    u = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    mr = tl.full([LANES], -INFINITY, tl.float32)
    sr = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    tiles = (end - begin) // BLOCK
    if tiles > 0:
        # The next tile is on its way while one is worked on.
        columns = tile_columns(begin, LANES, WIDE)
        ahead = load(z, columns, z_col, end, Z_UNIT, False)
        ahead_r = load(r, columns, r_col, end, R_UNIT, False) if KL else ahead
        for i in range(tiles):
            x = ahead.to(tl.float32)
            y = ahead_r.to(tl.float32)
            start = begin + i * BLOCK
            columns = tile_columns(begin + tl.minimum(i + 1, tiles - 1) * BLOCK, LANES, WIDE)
            ahead = load(z, columns, z_col, end, Z_UNIT, False)
            ahead_r = load(r, columns, r_col, end, R_UNIT, False) if KL else ahead
            if EXACT:
                x = tl.where(tile_columns(start, LANES, WIDE) == column, chosen, x)
            if GUIDED:
                y = guided(x, y, share)
            m, s, first, u, q, mr, sr, cross = _fold(
                x, y, start, m, s, first, u, q, mr, sr, cross, ENTROPY, SQUARES, KL
            )
    start = begin + tiles * BLOCK
    if start < end:
        columns = tile_columns(start, LANES, WIDE)
        x = load(z, columns, z_col, end, Z_UNIT, True).to(tl.float32)
        y = load(r, columns, r_col, end, R_UNIT, True).to(tl.float32) if KL else x
        if EXACT:
            x = tl.where(columns == column, chosen, x)
        if GUIDED:
            y = guided(x, y, share)
        m, s, first, u, q, mr, sr, cross = _fold(
            x, y, start, m, s, first, u, q, mr, sr, cross, ENTROPY, SQUARES, KL
        )

    highest, offset, scale = _lanes_to_one(m)
    # Ties go to the first column, as greedy decoding resolves them.
    lane = first + tl.arange(0, LANES) * WIDE
    leader = tl.min(tl.where(m == highest, lane, NO_COLUMN), axis=0)
    near = leader + tl.arange(0, WIDE)
    leading = load(z, near, z_col, end, Z_UNIT, True).to(tl.float32)
    if EXACT:
        leading = tl.where(near == column, chosen, leading)
    argmax = tl.min(tl.where(leading == highest, near, NO_COLUMN), axis=0)

    out += row
    C: tl.constexpr = 4 + ENTROPY + SQUARES + TOP + 3 * KL
    out += part.to(tl.int64) * C * out_row
    tl.store(out, highest)
    tl.store(out + out_row, tl.sum(s * scale, axis=0))
    tl.store(out + 2 * out_row, chosen)
    tl.store(out + 3 * out_row, (argmax + vocab_start).to(tl.float32))
    if ENTROPY:
        tl.store(out + 4 * out_row, tl.sum(scale * (u + offset * s), axis=0))
    if SQUARES:
        tl.store(out + (4 + ENTROPY) * out_row, tl.sum(scale * scale * q, axis=0))
    if KL:
        highest_r, offset_r, scale_r = _lanes_to_one(mr)
        each = tl.where(scale_r == 0.0, 0.0, scale_r * (cross + (offset_r - offset) * sr))
        tl.store(out + (C - 3) * out_row, highest_r)
        tl.store(out + (C - 2) * out_row, tl.sum(sr * scale_r, axis=0))
        tl.store(out + (C - 1) * out_row, tl.sum(each, axis=0))
    if TOP:
        tl.store(lanes + (row * parts + part) * LANES + tl.arange(0, LANES), m)


def parts_of(rows: int, vocab: int, searched: bool) -> tuple[int, int]:
    """(number of parts of a row, columns of one): several where rows are few, and few tiles in each
    where the lanes are to be searched."""
    tiles = blocks(vocab, BLOCK)
    parts = min(tiles, blocks(PROGRAMS, max(rows, 1)))
    if searched:
        parts = max(parts, blocks(tiles, SEARCHED_TILES))
    size = blocks(tiles, parts) * BLOCK
    return blocks(vocab, size), size


def part_statistics(
    logits_nV: Tensor,
    target_n: Tensor,
    vocab_start: int,
    want: Wanted,
    *,
    reference_nV: Tensor | None = None,
    exact_n: Tensor | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(statistics [P, C, n] of P parts of a row, lane maxima [n, P · lanes] if top k is wanted).

    `exact_n` fp32: the target's logit, in place of the stored one wherever this shard holds it.
    Rows whose target is `ignore_index` are not read, nor written. V is at least 1. The rows `top`
    are left to likeliest.py.
    """
    rows, vocab = logits_nV.shape
    parts, size = parts_of(rows, vocab, bool(want.top_k))
    out = torch.empty(parts, want.count, rows, dtype=torch.float32, device=logits_nV.device)
    per_access = wide(logits_nV)
    lanes = None
    if want.top_k:
        lanes = torch.empty(
            rows, parts * (BLOCK // per_access), dtype=torch.float32, device=out.device
        )
    reference = logits_nV if reference_nV is None else reference_nV
    if not rows:
        return out, lanes
    with device_of(logits_nV):
        statistics_kernel[(rows * parts,)](
            logits_nV, *logits_nV.stride(), reference, *reference.stride(), target_n,
            out if exact_n is None else exact_n, out, rows, out if lanes is None else lanes,
            vocab_start, vocab, size, parts, 0 if ignore_index is None else ignore_index,
            want.reference_share,
            ENTROPY=want.entropy, SQUARES=want.sum_sq_prob, KL=want.kl, TOP=want.top_k,
            EXACT=exact_n is not None, Z_UNIT=logits_nV.stride(1) == 1,
            R_UNIT=reference.stride(1) == 1, SKIP=ignore_index is not None, GUIDED=want.guided,
            LANES=BLOCK // per_access, WIDE=per_access, num_warps=WARPS,
        )  # fmt: skip
    return out, lanes
