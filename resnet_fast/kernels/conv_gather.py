"""Convolution as implicit GEMM by pointers: any layout, geometry, dtype, groups and GPU."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from ..spec.dtypes import stats_dtype
from . import config_select
from .config_select import Config
from .conv_epilogue import columns, epilogue
from .conv_plan import (
    FLAT_CONFIGS,
    IEEE_CONFIGS,
    POINTER_CONFIGS,
    Fusion,
    double_configs,
    eligible,
    gemm_of,
    key,
    precision,
)  # fmt: skip
from .conv_split import SPLITS, is_last, meeting_place, share, sum_of_parts, with_splits
from .conv_windows import as_windows, takes_windows
from .launch import all_registers, launch, target
from .sizes import cdiv, next_power_of_2
from .tile_math import store_moments, sum_rows, widen


@triton.jit
def conv_affine_act_kernel(
    x,
    w,
    residual,
    y,
    scale,
    shift,
    partial,
    sums,
    counters,
    x_sn,
    x_sc,
    x_sh,
    x_sw,
    w_sk,
    w_sc,
    w_sr,
    w_ss,
    r_sn,
    r_sk,
    r_sp,
    r_sq,
    y_sn,
    y_sk,
    y_sp,
    y_sq,
    H,
    W,
    P,
    Q,
    pixels,
    channels,
    filters,
    k_tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT_CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = relu(scale·conv(x, w) + shift + residual) by pointers: any strides and groups.

    `partial` receives the moments of every tile of y, for batch statistics.

    channels and filters are those of one group. FLAT_CHANNELS is the number of channels if they are
    few, else 0. If it is set, the loop walks GEMM_K = R·S·C without a break. At 0 a step is BLOCK_K
    channels of one filter tap, and one vector of offsets addresses its pixels. These offsets are
    multiples of ALIGNED values.
    Grid: axis 0: one program per BLOCK_M output pixels and BLOCK_N filters, filters fastest;
    axis 1: groups; axis 2: the SPLIT parts of GEMM_K (`conv_split`, only with FLAT_CHANNELS = 0).
    Bytes moved: as in the descriptor kernel.
    Why: pointers reach what descriptors cannot describe, at the extra cost of masks and offsets.
    """
    pid = tl.program_id(0)
    group = tl.program_id(1)
    acc_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    m = pid // k_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % k_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = (m // Q // P).to(tl.int64), m // Q % P, m % Q
    h0, v0 = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    x += group.to(tl.int64) * channels * x_sc
    w += group.to(tl.int64) * filters * w_sk
    pixel = tl.multiple_of(n * x_sn + h0.to(tl.int64) * x_sh + v0.to(tl.int64) * x_sw, ALIGNED)
    is_pixel, is_filter = m < pixels, k < filters

    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    if FLAT_CHANNELS > 0:
        tl.static_assert(SPLIT == 1)
        for i in range(0, R * S * FLAT_CHANNELS, BLOCK_K):
            f = i + tl.arange(0, BLOCK_K)
            c, tap = f % FLAT_CHANNELS, f // FLAT_CHANNELS
            r, s = tap // S, tap % S
            dh, dv = r * DILATION_H, s * DILATION_W
            h, v = h0[:, None] + dh[None, :], v0[:, None] + dv[None, :]
            inside = is_pixel[:, None] & (tap < R * S)[None, :]
            inside &= (h >= 0) & (h < H) & (v >= 0) & (v < W)
            a = tl.load(
                x + (pixel[:, None] + (c * x_sc + dh * x_sh + dv * x_sw)[None, :]), inside, 0.0
            )
            at = (c * w_sc + r * w_sr + s * w_ss)[:, None] + k[None, :] * w_sk
            b = tl.load(w + at, (tap < R * S)[:, None] & is_filter[None, :], 0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc_dtype)
    else:
        c_tiles = tl.cdiv(channels, BLOCK_K)
        begin, end = share(R * S * c_tiles, tl.program_id(2), SPLIT)
        for i in range(begin, end):
            tap = i // c_tiles
            c = i % c_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
            r, s = tap // S, tap % S
            h, v = h0 + r * DILATION_H, v0 + s * DILATION_W
            inside = is_pixel & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            at = pixel + (r * DILATION_H * x_sh + s * DILATION_W * x_sw)
            mask = inside[:, None] & (c < channels)[None, :]
            a = tl.load(x + (at[:, None] + (c * x_sc)[None, :]), mask, 0.0)
            at = (c * w_sc)[:, None] + (k * w_sk)[None, :] + (r * w_sr + s * w_ss)
            b = tl.load(w + at, (c < channels)[:, None] & is_filter[None, :], 0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc_dtype)

    if SPLIT > 1:
        tile = group * tl.num_programs(0) + pid
        if not is_last(acc, sums, counters, tile, tl.program_id(2), SPLIT):
            return
        acc = sum_of_parts(acc, sums, tile, SPLIT)
    r_at, y_at = n * r_sn + p * r_sp + q * r_sq, n * y_sn + p * y_sp + q * y_sq
    first, last = group * filters, (group + 1) * filters
    parts = columns(acc)
    WIDTH: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64
    for i in tl.static_range(BLOCK_N // WIDTH):
        k = first + pid % k_tiles * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = is_pixel[:, None] & (k < last)
        rest = None
        if residual is not None:
            rest = tl.load(residual + (r_at[:, None] + k * r_sk), inside, 0.0)
        part = epilogue(parts[i], rest, k, last, scale, shift, RELU).to(y.dtype.element_ty)
        tl.store(y + (y_at[:, None] + k * y_sk), part, inside)
        if partial is not None:
            tile, tiles = pid // k_tiles, tl.num_programs(0) // k_tiles
            n = tl.zeros((1, WIDTH), acc_dtype) + tl.minimum(pixels - tile * BLOCK_M, BLOCK_M)
            v = tl.where(is_pixel[:, None], widen(part), 0.0)
            pivot = sum_rows(v) / n
            d = tl.where(is_pixel[:, None], v - pivot, 0.0)
            every = tl.num_programs(1) * filters
            own = tl.where(k < last, k, every)  # none of the next group
            sums, squares = sum_rows(d), sum_rows(d * d)
            store_moments(partial, tile, tiles, own, every, n, pivot, sums, squares)


def by_pointers(x: Tensor, w: Tensor, conv: Conv, f: Fusion, y: Tensor) -> Tensor | None:
    """Compute y in place; returns the moments of its tiles if `f.stats`, else None."""
    if takes_windows(x, w, conv):
        x, w, conv = as_windows(x, w, conv)
    n, c, h, width = x.shape
    channels, filters = w.size(1), w.size(0) // conv.groups
    r, s = w.shape[2:]
    p, q = y.shape[2:]
    aligned = math.gcd(*(x.stride(i) for i in (0, 2, 3)), 16)
    pixels = n * p * q
    if max(pixels, c * h * width, w.size(0) * p * q) >= 2**31 - 512:
        raise ValueError(
            "x: expected fewer than 2^31 - 512 output pixels and values per image, "
            f"got {pixels} output pixels from shape {tuple(x.shape)}"
        )
    residual = y if f.residual is None else f.residual
    flat_channels = channels if channels < 16 else 0
    if x.dtype == torch.float64:
        configs = double_configs(x)
    elif precision(x) == "ieee":
        configs = IEEE_CONFIGS
    else:
        # With moments 256 pixels spill on sm_100.
        wide = POINTER_CONFIGS if f.plain else POINTER_CONFIGS[1:]
        configs = FLAT_CONFIGS if flat_channels else wide


    def start(config: Config) -> Tensor | None:
        partial = None
        block_m, block_n, block_k, warps, stages, split = config
        block_k = block_k * 2 // x.element_size()
        if not flat_channels:
            block_k = min(block_k, max(16, next_power_of_2(channels)))
        k_tiles = cdiv(filters, block_n)
        boxes = cdiv(pixels, block_m)
        if f.stats:
            partial = x.new_empty(4, boxes, w.size(0), dtype=stats_dtype(x))
        meeting = meeting_place(x, boxes * k_tiles * conv.groups, block_m, block_n, split)
        launch(
            conv_affine_act_kernel, (boxes * k_tiles, conv.groups, split),
            x, w, f.residual, y, f.scale, f.shift, partial, *meeting, *x.stride(), *w.stride(),
            *residual.stride(), *y.stride(), h, width, p, q, pixels, channels, filters, k_tiles, r,
            s, *conv.stride, *conv.padding, *conv.dilation, f.relu,
            precision(x), flat_channels, aligned, block_m, block_n, block_k, split,
            num_warps=warps, num_stages=stages, **all_registers(x),
        )  # fmt: skip
        return partial

    gpu = target(x)
    configs = eligible(configs, filters, gpu.shared)
    gemm = gemm_of(x, w, conv, f)
    splits = () if flat_channels else SPLITS
    configs, rule = with_splits(configs, gemm, gpu.multiprocessors, gpu.shared, splits)
    where = key(x, w, conv, f)
    return start(config_select.choose("conv_affine_act", where, configs, rule, x, start))
