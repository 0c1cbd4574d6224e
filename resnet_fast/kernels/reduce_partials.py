"""Second half of reductions over pixels by two launches: merge the partial results of the splits.

Channel-sized launches merge the splits in a fixed order, so a result has the same bits in every
run. Every part of a statistic carries its own count.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bn_finalize import share_of, store_finalized
from .launch import all_registers, launch
from .sizes import cdiv, next_power_of_2
from .tile_math import sum_rows

BLOCK_C = 8  # channels of a program: 32 bytes, so that many programs load at once
TILES_A_SPLIT = 1024
SUMS_AT_ONCE, SUMS_A_FOLD = 1024, 256  # above the first, `fold` reduces them, with more programs
FOLDED = 4096  # elements that a program of `fold` loads at a time


@triton.jit
def _store_xhat(out, b, total, rstd, scale, k, is_channel, count):
    """out = rstd·total, and with scale b = −scale·rstd·out/count; all but total are pointers."""
    spread = tl.load(rstd + k, is_channel, 0.0)
    xhat = total * spread
    tl.store(out + k, xhat, is_channel)
    if scale is not None:
        own = share_of(spread.to(tl.float64) * xhat, scale, k, is_channel, count)
        tl.store(b + k, own.to(b.dtype.element_ty), is_channel)


@triton.jit
def merge_sums_kernel(
    partial,
    rstd,
    scale,
    res_rstd,
    res_scale,
    sum_dy,
    sum_dy_xhat,
    b,
    c,
    sum_dy_res_xhat,
    res_b,
    res_c,
    splits,
    channels,
    count,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ over splits of partial[0], rstd·Σ partial[1], res_rstd·Σ partial[2].

    With scale also b = −scale·rstd·(rstd·Σ partial[1])/M and c = −scale·Σ partial[0]/M, where M is
    `count`; with res_scale the same of partial[2].
    Grid: one program per sum and BLOCK_C channels. Bytes moved: sums · splits · channels values,
    from L2, where the previous launch left them.
    Why: a fixed order of additions gives the same bits in every run.
    """
    which = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    is_channel = k < channels
    total = tl.zeros((BLOCK_S, BLOCK_C), partial.dtype.element_ty)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        at = (which * splits + s) * channels + k
        total += tl.load(partial + at, (s < splits) & is_channel, 0.0)
    result = sum_rows(total)
    if which == 0:
        tl.store(sum_dy + k, result, is_channel)
        if scale is not None:
            own = share_of(result, scale, k, is_channel, count)
            tl.store(c + k, own.to(c.dtype.element_ty), is_channel)
        if res_scale is not None:
            own = share_of(result, res_scale, k, is_channel, count)
            tl.store(res_c + k, own.to(res_c.dtype.element_ty), is_channel)
    elif which == 1:
        _store_xhat(sum_dy_xhat, b, result, rstd, scale, k, is_channel, count)
    else:
        if res_rstd is not None:
            _store_xhat(sum_dy_res_xhat, res_b, result, res_rstd, res_scale, k, is_channel, count)


@triton.jit
def fold_kernel(partial, out, count, per_fold, size, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """out[g, f] = Σ of partial[g, f·per_fold .. (f + 1)·per_fold), vectors of `size` elements.

    Grid: one program per BLOCK_E elements, fold f and group g. Bytes moved: partial once, out once.
    Why: the same bits in every run, and more programs than `merge_sums_kernel` has.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    fold, group = tl.program_id(1), tl.program_id(2)
    begin = fold * per_fold
    end = tl.minimum(begin + per_fold, count)
    total = tl.zeros((BLOCK_S, BLOCK_E), partial.dtype.element_ty)
    first = group.to(tl.int64) * count
    for s0 in range(begin, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        total += tl.load(partial + ((first + s) * size + e), (s < end) & (e < size), 0.0)
    at = (group.to(tl.int64) * tl.num_programs(1) + fold) * size + e
    tl.store(out + at, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), e < size)


@triton.jit
def merge_tiles_kernel(
    partial,
    weight,
    bias,
    out_n,
    out_mean,
    out_rest,
    out_m2,
    scale,
    shift,
    rstd,
    tiles,
    tiles_per_split,
    channels,
    values,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge moments of tiles [4, tiles, C] into those of splits of tiles_per_split: [4, splits, C].

    Rows are n, mean, the rounding error of the mean (rest) and m2. The last merge, of all tiles,
    needs only mean and m2 (out_n and out_rest are None) and finalizes them: scale, shift and rstd
    of `bn_finalize_kernel` for `values` values per channel. With p the first tile's mean and
    d = (mean_t − p) + rest_t: μ = Σ n·d/Σ n, twice, the second time with p + μ as p, which corrects
    the rounding of the first; m2 = Σ m2_t + Σ n·(d − μ)². Chan, Golub & LeVeque 1979, "Updating
    formulae and a pairwise algorithm for computing sample variances", eq. 2.1.
    Grid: one program per split and BLOCK_C channels. Bytes moved: partial three times, from
    L2 after the first.
    Why: centring on p and carrying rest keep the digits of m2 where |mean| is large.
    """
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    is_channel = c < channels
    wide = partial.dtype.element_ty
    plane = (tl.full((), 0, tl.int64) + tiles) * channels
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    pivot = tl.load(partial + plane + (tl.full((), 0, tl.int64) + begin) * channels + c, is_channel)
    total = tl.zeros((1, BLOCK_C), wide)
    mu = tl.zeros((1, BLOCK_C), wide)
    for turn in tl.static_range(2):
        count = tl.zeros((BLOCK_S, BLOCK_C), wide)
        drift = tl.zeros((BLOCK_S, BLOCK_C), wide)
        for t0 in range(begin, end, BLOCK_S):
            t = t0 + tl.arange(0, BLOCK_S)[:, None]
            inside = (t < end) & is_channel
            at = partial + t.to(tl.int64) * channels + c
            n = tl.load(at, inside, 0.0)
            d = tl.load(at + plane, inside, 0.0) - pivot + tl.load(at + 2 * plane, inside, 0.0)
            count += n
            drift += tl.where(inside, n * d, 0.0)
        total = sum_rows(count)
        mu = sum_rows(drift) / tl.maximum(total, 1.0)
        if turn == 0:
            pivot += mu
    m2 = tl.zeros((BLOCK_S, BLOCK_C), wide)
    for t0 in range(begin, end, BLOCK_S):
        t = t0 + tl.arange(0, BLOCK_S)[:, None]
        inside = (t < end) & is_channel
        at = partial + t.to(tl.int64) * channels + c
        d = tl.load(at + plane, inside, 0.0) - pivot + tl.load(at + 2 * plane, inside, 0.0) - mu
        own = tl.load(at + 3 * plane, inside, 0.0)
        m2 += tl.where(inside, own + tl.load(at, inside, 0.0) * d * d, 0.0)
    mean = pivot + mu
    at = split * channels + c
    spread = sum_rows(m2)
    tl.store(out_mean + at, mean, is_channel)
    tl.store(out_m2 + at, spread, is_channel)
    if scale is not None:
        store_finalized(
            scale, shift, rstd, mean, spread, weight, bias, c, is_channel, values, EPS
        )  # fmt: skip
    if out_n is not None:
        tl.store(out_n + at, total, is_channel)
        tl.store(out_rest + at, pivot - mean + mu, is_channel)


def merge_tiles(
    partial: Tensor, values: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """mean, m2, scale, shift, rstd [C] from moments of tiles [4, tiles, C], of `values` values."""
    _, count, channels = partial.shape
    mean, m2, *norm = (partial.new_empty(channels) for _ in range(5))
    while True:
        splits = cdiv(count, TILES_A_SPLIT)
        last = splits == 1
        moments = None if last else partial.new_empty(4, splits, channels)
        out = (None, mean, None, m2) if last else tuple(moments)
        ends = norm if last else [None] * 3
        launch(
            merge_tiles_kernel, (splits, cdiv(channels, BLOCK_C)),
            partial, weight, bias, *out, *ends, count, TILES_A_SPLIT, channels, values, eps,
            _rows_at_once(count), BLOCK_C, num_warps=4,
        )  # fmt: skip
        if last:
            return mean, m2, *norm
        partial, count = moments, splits


def fold(partial: Tensor, out: Tensor, per_fold: int | None = None) -> None:
    """Fill `out` with sums over the second to last axis of partial [..., count, size].

    per_fold: how many vectors one sum adds, by default all; if given, out is [..., folds, size].
    """
    count, size = partial.shape[-2:]
    groups = partial.numel() // max(1, count * size)
    per_fold = per_fold or count
    rows = max(8, min(next_power_of_2(per_fold), FOLDED // 32))
    block = FOLDED // rows
    launch(
        fold_kernel, (cdiv(size, block), cdiv(count, per_fold), groups),
        partial, out, count, per_fold, size, rows, block, num_warps=4, **all_registers(partial),
    )  # fmt: skip


def _rows_at_once(count: int) -> int:
    """Rows of `count` that a program loads at a time: many, because it waits for each load."""
    return min(256, max(16, next_power_of_2(count)))


def merge_sums(
    partial: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    count: int,
    res_rstd: Tensor | None = None,
    res_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Σ0, then rstd·Σ1, b and c, then res_rstd·Σ2, res_b and res_c, of partial [2 or 3, splits, C].

    b and c are those of `bn_bwd_finalize` for `count` values; without scale, and the last three
    without a third sum, they are empty.
    """
    sums, splits, channels = partial.shape
    if splits > SUMS_AT_ONCE:
        folds = partial.new_empty(sums, cdiv(splits, SUMS_A_FOLD), channels)
        fold(partial, folds, SUMS_A_FOLD)
        return merge_sums(folds, rstd, scale, count, res_rstd, res_scale)
    there = (True, True, *(scale is not None,) * 2, sums > 2, *(res_scale is not None,) * 2)
    out = [partial.new_empty(channels if own else 0) for own in there]
    written = [t if own else None for t, own in zip(out, there, strict=True)]
    launch(
        merge_sums_kernel, (sums, cdiv(channels, BLOCK_C)),
        partial, rstd, scale, res_rstd, res_scale, *written, splits, channels, max(count, 1),
        _rows_at_once(splits), BLOCK_C, num_warps=4,
    )  # fmt: skip
    return tuple(out)
