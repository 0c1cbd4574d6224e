"""Batch statistics: mean and centred second moment per channel, in one pass over the tensor."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..spec.dtypes import stats_dtype
from ..spec.layout import is_channels_last
from . import config_select
from .config_select import Config
from .launch import launch
from .reduce_partials import merge_moments
from .tile_math import element_offsets, sum_rows, widen

CONFIGS = ((4096, 4, 8), (2048, 8, 4), (4096, 2, 8), (2048, 4, 8))
# elements per tile, programs per multiprocessor, warps


@triton.jit
def _pixel(x, m, c, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Channels c [1, C] of pixel m, counted over all images, in fp32 (fp64 for double)."""
    m = tl.full((), 0, tl.int64) + m
    at = element_offsets(m, tl.zeros_like(c), c, channels, pixels, CHANNELS_LAST)
    return widen(tl.load(x + at, c < channels, 0.0))


@triton.jit
def bn_stats_kernel(
    x,
    partial,
    count,
    channels,
    pixels,
    tiles_per_split,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean, Σ(v − mean)² of v = x − pivot over the pixels of a split; pivot = median of 3 pixels.

    partial is [1 + 2·splits, C]: the pivot, the means of all splits, then their second moments.

    Each of the BLOCK_M · BLOCK_C lanes runs Welford's recurrence over the tiles of its split. For
    the n-th value v: δ = v − mean; mean += δ/n; m2 += δ·(v − mean). At the end the lanes of a
    channel are merged by their exact counts. Welford 1962, Technometrics 4(3).
    Accuracy: values are centred before they are squared, and no mean is rounded at the magnitude of
    x. A channel with mean 1000 and deviation 1 keeps the digits of its variance. The median
    prevents a single outlier from being the pivot.
    Grid: one program per split and BLOCK_C channels. Bytes moved: x once, splits · channels pairs.
    Why: one recurrence per lane, not per tile, moves no data between threads until the end.
    """
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    wide: tl.constexpr = partial.dtype.element_ty
    first = _pixel(x, 0, c, channels, pixels, CHANNELS_LAST)
    middle = _pixel(x, count // 2, c, channels, pixels, CHANNELS_LAST)
    last = _pixel(x, count - 1, c, channels, pixels, CHANNELS_LAST)
    low, high = tl.minimum(first, middle), tl.maximum(first, middle)
    pivot = tl.maximum(low, tl.minimum(high, last))
    mean = tl.zeros((BLOCK_M, BLOCK_C), wide)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), wide)
    n = tl.zeros((BLOCK_M, 1), tl.int32)
    for tile in range(tiles_per_split):
        m0 = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_M
        is_pixel = m0 + lane < count
        at = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
        v = widen(tl.load(x + at, is_pixel & is_channel, 0.0)) - pivot
        delta = tl.where(is_pixel, v - mean, 0.0)
        n += is_pixel.to(tl.int32)
        mean += delta * (tl.full((), 1.0, wide) / (tile + 1))
        m2 += delta * (v - mean)
    lanes = n.to(wide)
    total = sum_rows(lanes)
    centre = sum_rows(tl.where(lane == 0, mean, 0.0))
    for _ in tl.static_range(2):  # the second pass corrects the rounding of the first
        drift = sum_rows(lanes * (mean - centre))
        centre += drift / tl.maximum(total, 1.0)
    m2 += lanes * (mean - centre) * (mean - centre)
    if split == 0:
        tl.store(partial + c, pivot, is_channel)
    out = partial + (1 + split) * channels + c
    tl.store(out, centre, is_channel)
    tl.store(out + tl.num_programs(0) * channels, sum_rows(m2), is_channel)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.bn_stats`: one pass over x, then one launch that merges its partial moments."""
    channels, dtype = x.size(1), stats_dtype(x)
    if x.numel() == 0:
        return x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype)
    count, pixels, channels_last = x.numel() // channels, x.size(2) * x.size(3), is_channels_last(x)

    def start(config: Config) -> tuple[Tensor, int]:
        elements, per_processor, warps = config
        split = config_select.reduction(elements, per_processor, count, channels, channels_last, x)
        partial = x.new_empty(1 + 2 * split.splits, channels, dtype=dtype)
        launch(
            bn_stats_kernel, split.grid(channels),
            x, partial, count, channels, pixels, split.tiles, channels_last, split.m, split.c,
            num_warps=warps, maxnreg=128,  # by default ptxas spills registers for more occupancy
        )  # fmt: skip
        return partial, split.m * split.tiles

    key = count, channels, channels_last, x.dtype
    partial, values = start(config_select.choose("bn_stats", key, CONFIGS, 0, x, start))
    return merge_moments(partial, count, values)
