"""K2: the gradient of a shard's logits in one read and one write, in place if asked.

Shapes: n rows, V columns that are real, W ≥ V columns of the result. The formula is that of
losses/vocab_gradient.py, all but its term of the k likeliest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dft.losses.kernels.tiles import LOG2E, LOWEST, blocks, device_of, guided, load
from megatron_dft.losses.vocab_statistics import Wanted

# Four accesses of 16 bytes by each of 256 threads.
BLOCK_BYTES = 16384
WARPS = 8


class Upstream(NamedTuple):
    """Gradients [n] fp32 of log p and of the statistics, None where there is none."""

    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq_prob: Tensor | None = None
    kl: Tensor | None = None


@triton.jit
def _value(x, r, columns, column, M, log_sum, a, b, c, g, MR, k,
           MIXED: tl.constexpr, KL: tl.constexpr):  # fmt: skip
    """p·(a + b·log p + c·p) + g·onehot − k·e^{r−MR}; a has 1/Σ in it unless MIXED."""
    if MIXED:
        log_p = tl.maximum((x - M) - log_sum, LOWEST)
        p = tl.exp2(log_p * LOG2E)
        d = p * (a + b * log_p + c * p)
    else:
        d = tl.exp2((x - M) * LOG2E) * a
    if KL:
        d -= tl.exp2((r - MR) * LOG2E) * k
    return d + tl.where(columns == column, g, 0.0)


# The number of rows changes from batch to batch: no kernel of its own for each kind of it.
@triton.jit(do_not_specialize=["stats_row", "programs", "ignored", "share"])
def gradient_kernel(
    z, z_row, z_col, r, r_row, r_col, out, out_row, out_col, source, target, exact,
    stats, stats_row, g_log_prob, g_entropy, g_squares, g_kl,
    vocab_start, vocab, width, programs, ignored, share,
    LOG_PROB: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, KL: tl.constexpr,
    ENTROPY_AT: tl.constexpr, SQUARES_AT: tl.constexpr, KL_AT: tl.constexpr,
    SOURCE: tl.constexpr, EXACT: tl.constexpr, SKIP: tl.constexpr, GUIDED: tl.constexpr,
    Z_UNIT: tl.constexpr, R_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row and BLOCK columns; row i of `out` is from row source[i] of z and r."""
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    start = (program % programs) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    out += row * out_row
    into = out + columns if OUT_UNIT else out + columns.to(tl.int64) * out_col
    source_row = row
    if SOURCE:
        source_row = tl.load(source + row)
    wanted = tl.load(target + row)
    skipped = False
    if SKIP:
        skipped = wanted == ignored
    if skipped:
        tl.store(into, tl.zeros([BLOCK], out.dtype.element_ty), mask=columns < width)
    else:
        z += source_row * z_row
        r += source_row * r_row
        stats += row
        column = (wanted - vocab_start).to(tl.int32)
        column = tl.where((column >= 0) & (column < vocab), column, -1)
        M = tl.load(stats)
        S = tl.load(stats + stats_row)
        log_sum = tl.log(S)
        MIXED: tl.constexpr = ENTROPY or SQUARES
        a = 0.0
        b = 0.0
        c = 0.0
        g = 0.0
        k = 0.0
        MR = 0.0
        if LOG_PROB:
            g = tl.load(g_log_prob + row)
            a -= g
        if ENTROPY:
            b = -tl.load(g_entropy + row)
            a += b * tl.load(stats + ENTROPY_AT * stats_row)
        if SQUARES:
            c = 2.0 * tl.load(g_squares + row)
            a -= c * tl.load(stats + SQUARES_AT * stats_row)
        if KL:
            k = tl.load(g_kl + row)
            a += k
            MR = tl.load(stats + KL_AT * stats_row)
            k = k / tl.load(stats + (KL_AT + 1) * stats_row)
        if not MIXED:
            a = a / S
        if start + BLOCK <= vocab:
            x = load(z, columns, z_col, vocab, Z_UNIT, False).to(tl.float32)
            y = load(r, columns, r_col, vocab, R_UNIT, False).to(tl.float32) if KL else x
            if EXACT:
                x = tl.where(columns == column, tl.load(exact + row), x)
            if GUIDED:
                y = guided(x, y, share)
            d = _value(x, y, columns, column, M, log_sum, a, b, c, g, MR, k, MIXED, KL)
            tl.store(into, d.to(out.dtype.element_ty))
        else:
            x = load(z, columns, z_col, vocab, Z_UNIT, True).to(tl.float32)
            y = load(r, columns, r_col, vocab, R_UNIT, True).to(tl.float32) if KL else x
            if EXACT:
                x = tl.where(columns == column, tl.load(exact + row), x)
            if GUIDED:
                y = guided(x, y, share)
            d = _value(x, y, columns, column, M, log_sum, a, b, c, g, MR, k, MIXED, KL)
            # Padding is read as −inf: it has no probability and no gradient.
            tl.store(into, d.to(out.dtype.element_ty), mask=columns < width)


def gradient_(
    out_nW: Tensor,
    logits_nV: Tensor,
    target_n: Tensor,
    vocab_start: int,
    want: Wanted,
    stats_Cn: Tensor,
    upstream: Upstream,
    *,
    reference_nV: Tensor | None = None,
    exact_n: Tensor | None = None,
    source_n: Tensor | None = None,
    ignore_index: int | None = None,
) -> None:
    """Write the gradient of the logits into `out_nW`, which may be where the logits are.

    `stats_Cn`: of merge.finish. Columns from V on become 0, rows whose target is `ignore_index`
    too. `source_n` int64: the logits of row i are row source_n[i]; in place no row may be read that
    another program writes. A second use of overwritten logits in a backward fails.
    """
    rows, vocab = len(out_nW), logits_nV.shape[1]
    width = out_nW.shape[1]
    if not rows or not width:
        return
    reference = logits_nV if reference_nV is None else reference_nV
    block = BLOCK_BYTES // logits_nV.element_size()
    programs = blocks(width, block)
    place = want.rows()
    with device_of(out_nW):
        gradient_kernel[(rows * programs,)](
            logits_nV, *logits_nV.stride(), reference, *reference.stride(), out_nW,
            *out_nW.stride(), target_n if source_n is None else source_n, target_n,
            stats_Cn if exact_n is None else exact_n, stats_Cn, stats_Cn.stride(0),
            *(stats_Cn if g is None else g for g in upstream),
            vocab_start, vocab, width, programs, 0 if ignore_index is None else ignore_index,
            want.reference_share,
            LOG_PROB=upstream.log_prob is not None, ENTROPY=upstream.entropy is not None,
            SQUARES=upstream.sum_sq_prob is not None, KL=upstream.kl is not None,
            ENTROPY_AT=place["z_exp"].start, SQUARES_AT=place["sq_exp"].start,
            KL_AT=place["ref_max"].start, SOURCE=source_n is not None, EXACT=exact_n is not None,
            SKIP=ignore_index is not None, GUIDED=want.guided, Z_UNIT=logits_nV.stride(1) == 1,
            R_UNIT=reference.stride(1) == 1, OUT_UNIT=out_nW.stride(1) == 1, BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
    # Autograd cannot see what a kernel writes.
    torch.autograd.graph.increment_version(out_nW)
