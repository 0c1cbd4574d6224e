"""Statistics and sums of each image: the reductions of a squeeze-and-excitation block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.dtypes import stats_dtype
from ..spec.layout import is_channels_last, memory_format
from . import config_select
from .config_select import Config
from .launch import launch
from .sizes import cdiv
from .tile_math import row_bits, sum_rows, widen

CONFIGS = ((32, 4), (64, 4), (64, 8))  # channels per tile, warps
BLOCK_P = 64


@triton.jit
def image_stats_kernel(
    x,
    mean,
    m2,
    x_sn,
    x_sc,
    x_sp,
    channels,
    pixels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean[n, c] and m2[n, c] = Σ(v − mean)² over the pixels of x[n, c].

    Each lane sums d = v − p and d², where p is the mean of the first tile if that is finite, so
    that a mean far from zero does not cancel; then mean = p + Σd/P and m2 = Σd² − (Σd)²/P.
    Grid: one program per image and BLOCK_C channels; it walks the image's pixels BLOCK_P at a
    time. Bytes moved: x once, and the first tile again from L2; mean and m2 once.
    Why: the batch alone fills a GPU, so the pixels are not split and nothing is merged.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    wide: tl.constexpr = mean.dtype.element_ty
    lane, own = tl.arange(0, BLOCK_P)[:, None], x + n * x_sn + c * x_sc
    first = widen(tl.load(own + lane * x_sp, (lane < pixels) & (c < channels), 0.0))
    pivot = sum_rows(first) / tl.minimum(pixels, BLOCK_P)
    # With more digits than x has (in fp64: than fp32 has), p would round all d the same way.
    narrow: tl.constexpr = tl.float32 if wide == tl.float64 else x.dtype.element_ty
    pivot = pivot.to(narrow).to(wide)
    pivot = tl.where(pivot - pivot == 0, pivot, 0.0)  # an infinite mean stays infinite
    sums = tl.zeros((BLOCK_P, BLOCK_C), wide)
    squares = tl.zeros((BLOCK_P, BLOCK_C), wide)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + lane
        v = widen(tl.load(own + p * x_sp, (p < pixels) & (c < channels), 0.0))
        d = tl.where(p < pixels, v - pivot, 0.0)
        sums += d
        squares += d * d
    total = sum_rows(sums)
    off = total / (tl.full((), 0.0, wide) + pixels)
    spread = sum_rows(squares) - total * off
    tl.store(mean + n * channels + c, pivot + off, c < channels)
    tl.store(m2 + n * channels + c, tl.where(spread < 0, 0.0, spread), c < channels)


@triton.jit
def gated_act_bwd_reduce_kernel(
    dy,
    mask,
    z,
    mean,
    masked,
    sum_dy,
    sum_dy_z,
    x_sn,
    x_sc,
    x_sp,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """masked = dy' = dy where the mask bit is set, else 0; Σdy' and Σdy'·(z − mean) per image.

    Without a mask dy' is dy and is not stored. mean and the sums are [N,C].
    Grid: as in `image_stats_kernel`.
    Bytes moved: dy, z and masked once each, and one mask bit per element.
    Why: dy' is the gradient of the residual; storing it here saves a pass over dy, and the pass for
    dz reads it in place of dy and the mask.
    """
    n = tl.program_id(0).to(tl.int64)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    wide: tl.constexpr = mean.dtype.element_ty
    lane, is_channel, at = tl.arange(0, BLOCK_P)[:, None], c < channels, n * x_sn + c * x_sc
    centre = tl.load(mean + n * channels + c, is_channel, 0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), wide)
    dot = tl.zeros((BLOCK_P, BLOCK_C), wide)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + lane
        inside = (p < pixels) & is_channel
        g = widen(tl.load(dy + at + p * x_sp, inside, 0.0))
        if mask is not None:
            if CHANNELS_LAST:
                on = row_bits(mask, n * pixels + p, p < pixels, c0, channels, BLOCK_C)
            else:
                width = tl.cdiv(pixels, 8)
                byte = tl.load(mask + (n * channels + c) * width + p // 8, inside, 0)
                on = (byte.to(tl.int32) >> (p % 8)) & 1 != 0
            g = tl.where(on, g, 0.0)
            tl.store(masked + at + p * x_sp, g.to(masked.dtype.element_ty), inside)
        v = widen(tl.load(z + at + p * x_sp, inside, 0.0))
        total += g
        dot += g * (v - centre)
    tl.store(sum_dy + n * channels + c, sum_rows(total), is_channel)
    tl.store(sum_dy_z + n * channels + c, sum_rows(dot), is_channel)


def image_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.image_stats` in one kernel launch; x is dense in NCHW or channels_last."""
    n, channels = x.shape[:2]
    mean, m2 = (x.new_empty(n, channels, dtype=stats_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return mean.zero_(), m2.zero_()

    def start(config: Config) -> None:
        block_c, warps = config
        launch(
            image_stats_kernel, (n, cdiv(channels, block_c)),
            x, mean, m2, *_sizes(x), BLOCK_P, block_c, num_warps=warps,
        )  # fmt: skip

    key = *x.shape, is_channels_last(x), x.dtype
    start(config_select.choose("image_stats", key, CONFIGS, 0, x, start))
    return mean, m2


def gated_act_bwd_reduce(
    dy: Tensor, mask: Tensor | None, z: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gated_act_bwd_reduce` in one kernel launch."""
    n, channels = dy.shape[:2]
    masked = dy.new_empty(0)
    if mask is not None:
        masked = torch.empty_like(dy, memory_format=memory_format(dy))
    sums = torch.empty_like(mean), torch.empty_like(mean)
    if dy.numel() == 0:
        return masked, *(t.zero_() for t in sums)

    def start(config: Config) -> None:
        block_c, warps = config
        launch(
            gated_act_bwd_reduce_kernel, (n, cdiv(channels, block_c)),
            dy, mask, z, mean, masked, *sums, *_sizes(dy), is_channels_last(dy), BLOCK_P, block_c,
            num_warps=warps,
        )  # fmt: skip

    key = *dy.shape, is_channels_last(dy), mask is not None, dy.dtype
    start(config_select.choose("gated_act_bwd_reduce", key, CONFIGS, 0, dy, start))
    return masked, *sums


def _sizes(x: Tensor) -> tuple[int, ...]:
    """Steps from image to image, channel to channel and pixel to pixel of dense x; C, H·W."""
    _, channels, height, width = x.shape
    pixels = height * width
    steps = (1, channels) if is_channels_last(x) else (pixels, 1)
    return channels * pixels, *steps, channels, pixels
