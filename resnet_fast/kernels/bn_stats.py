"""Batch statistics: mean and centred second moment per channel, in one pass over the tensor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime import recording
from ..spec.dtypes import stats_dtype
from ..spec.layout import is_channels_last
from . import config_select
from .bn_finalize import bn_finalize
from .config_select import Config
from .counters import counters
from .last_program import arrives_last, finish_moments
from .launch import launch, target
from .tile_math import element_offsets, store_moments, sum_rows, widen

CONFIGS = ((2048, 4, 8), (2048, 8, 8), (1024, 8, 4), (1024, 16, 4))
# elements per tile, programs per multiprocessor, warps
AT_ONCE = 4  # tiles: a multiprocessor has 64 KiB in flight, more than latency times bandwidth
MERGED = 2  # vectors of splits that the last program loads at a time
REGISTERS = 64  # for four programs at a time; twice as many in NCHW and on other GPUs


@triton.jit
def bn_stats_kernel(
    x,
    weight,
    bias,
    partial,
    counters,
    mean,
    m2,
    scale,
    shift,
    rstd,
    count,
    channels,
    pixels,
    tiles_per_split,
    EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and m2 = Σ(v − mean)² per channel of x; if given, scale, shift and rstd of its norm.

    partial[0..3, split] = n, mean, rest and m2 over the pixels of a split. The last program of a
    column merges them (`merge_moments`) and computes what `bn_finalize_kernel` does.
    Each of the BLOCK_M · BLOCK_C lanes sums d = v − p and d² over the tiles of its split, where p
    is the mean of the first tile without the largest and the smallest of its eighths, so that one
    outlier does not move it; at the end the lanes of a channel are summed. The moments, and a bound
    of their error, are those of `conv_moments_kernel`, with three quarters of a tile as n₁.
    Grid: one program per split and BLOCK_C channels.
    Bytes moved: x once, splits · 4 · channels into L2 and out of it.
    Why: a subtraction, an addition and a multiply-add per value, and no data between threads until
    the end. AT_ONCE tiles are loaded at a time.
    """
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    wide: tl.constexpr = partial.dtype.element_ty
    first = split.to(tl.int64) * tiles_per_split * BLOCK_M
    own = tl.minimum(count - first, tiles_per_split * BLOCK_M)  # pixels
    at = element_offsets(first, lane, c, channels, pixels, CHANNELS_LAST)
    v = widen(tl.load(x + at, (lane < own) & is_channel, 0.0))
    eighths = tl.sum(v.reshape(BLOCK_M // 8, 8, BLOCK_C), 0)
    extremes = tl.max(eighths, 0, keep_dims=True) + tl.min(eighths, 0, keep_dims=True)
    pivot = tl.sum(eighths, 0, keep_dims=True)
    if own >= BLOCK_M:
        pivot = (pivot - extremes) / (BLOCK_M - BLOCK_M // 4)
    else:
        pivot /= own
    # In fp64 p has the digits of fp32: more would round every sum of fp32 values the same way.
    pivot = pivot.to(tl.float32).to(wide)
    sums = tl.zeros((BLOCK_M, BLOCK_C), wide)
    squares = tl.zeros((BLOCK_M, BLOCK_C), wide)
    for tile in range(0, tiles_per_split, AT_ONCE):
        values = ()
        for i in tl.static_range(AT_ONCE):
            begin = (tile + i) * BLOCK_M
            at = element_offsets(first + begin, lane, c, channels, pixels, CHANNELS_LAST)
            values += (tl.load(x + at, (begin + lane < own) & is_channel, 0.0),)
        for i in tl.static_range(AT_ONCE):
            inside = (tile + i) * BLOCK_M + lane < own
            d = tl.where(inside, widen(values[i]) - pivot, 0.0)
            sums += d
            squares += d * d
    n = tl.zeros((1, BLOCK_C), wide) + own
    sums, squares = sum_rows(sums), sum_rows(squares)
    splits, column = tl.num_programs(0), tl.program_id(1)
    store_moments(partial, split, splits, c, channels, n, pivot, sums, squares)
    if not arrives_last(counters, column, splits):
        return
    finish_moments(
        partial, splits, mean, m2, scale, shift, rstd, weight, bias, column * BLOCK_C, channels,
        count, EPS, MERGED, BLOCK_S, BLOCK_C,
    )  # fmt: skip


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.bn_stats` in one kernel launch, one pass over x."""
    mean, m2 = bn_stats_finalized(x, None, None, None)
    return mean, m2


def bn_stats_finalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, ...]:
    """`bn_stats` and, with eps, its `bn_finalize`, in the same launch."""
    channels, dtype = x.size(1), stats_dtype(x)
    if x.numel() == 0:
        mean, m2 = (x.new_zeros(channels, dtype=dtype) for _ in range(2))
        return mean, m2, *(() if eps is None else bn_finalize(mean, m2, 0, weight, bias, eps))
    count, pixels, channels_last = x.numel() // channels, x.size(2) * x.size(3), is_channels_last(x)

    lean = channels_last and target(x).capability == 90  # elsewhere ptxas spills with so few
    registers = REGISTERS if lean else 2 * REGISTERS

    def start(config: Config) -> tuple[Tensor, ...]:
        elements, per_processor, warps = config
        split = config_select.reduction(elements, per_processor, count, channels, channels_last, x)
        grid = split.grid(channels)
        partial = x.new_empty(4, split.splits, channels, dtype=dtype)
        mean, m2, *norm = (partial.new_empty(channels) for _ in range(2 if eps is None else 5))
        launch(
            bn_stats_kernel, grid,
            x, weight, bias, partial, recording.step(counters, x, grid[1]), mean, m2,
            *(norm or (None,) * 3), count, channels, pixels, split.tiles, eps, channels_last,
            AT_ONCE, MERGED, max(8, split.m // MERGED), split.m, split.c, num_warps=warps,
            maxnreg=registers,
        )  # fmt: skip
        return mean, m2, *norm

    key = count, channels, channels_last, x.dtype
    return start(config_select.choose("bn_stats", key, CONFIGS, 0, x, start))
