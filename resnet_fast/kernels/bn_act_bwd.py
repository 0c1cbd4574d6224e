"""Pointwise backward: the sums that a batch norm's gradient needs, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.layout import is_channels_last, memory_format, rows_of
from . import config_select
from .bn_act import matrix_of
from .config_select import Config
from .launch import all_registers, launch
from .reduce_partials import merge_sums
from .tile_math import coefficients_at, element_offsets, mask_bits, sum_rows, unpack_bits, widen

APPLY_CONFIGS = ((4096, 4), (2048, 4), (8192, 8), (2048, 8))  # elements per tile, warps
REDUCE_CONFIGS = ((2048, 4, 8), (2048, 8, 8), (1024, 8, 4), (1024, 16, 4))
# elements per tile, programs per multiprocessor, warps
AT_ONCE = 2  # tiles: the loads of a multiprocessor in flight cover latency times bandwidth


@triton.jit
def bn_act_bwd_apply_kernel(
    dy,
    mask,
    a,
    z,
    mean,
    b,
    c,
    residual,
    dz,
    rows,
    inner,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """dz = a·dy' + b·(z − mean) + c + residual, dy' = dy where the mask bit is set, else 0.

    Terms whose argument is None are omitted; `mean` is omitted with `b`. The others may be [N,C],
    as in `bn_act_fwd_kernel`.
    Grid: as in `bn_act_fwd_kernel`.
    Bytes moved: dy, z, residual and dz once each, and one mask bit per element.
    Why: each mask byte is loaded once per tile and unpacked in registers, not once per element.
    """
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (row0 + r < rows)[:, None] & (i < inner)[None, :]
    at = row0 * inner + (r[:, None] * inner + i[None, :])
    k, is_channel = coefficients_at(row0, r, i, rows, inner, channels, pixels, CHANNELS_LAST)
    g = widen(tl.load(dy + at, inside, 0.0))
    if mask is not None:
        width = tl.cdiv(inner, 8)
        byte = tl.program_id(1) * (BLOCK_I // 8) + tl.arange(0, BLOCK_I // 8)
        exists = (row0 + r < rows)[:, None] & (byte < width)[None, :]
        bytes_at = row0 * width + (r[:, None] * width + byte[None, :])
        g = tl.where(unpack_bits(tl.load(mask + bytes_at, exists, 0)), g, 0.0)
    if a is not None:
        g *= tl.load(a + k, is_channel, 0.0)
    if c is not None:
        g += tl.load(c + k, is_channel, 0.0)
    if b is not None:
        centred = widen(tl.load(z + at, inside, 0.0)) - tl.load(mean + k, is_channel, 0.0)
        g = tl.fma(centred, tl.load(b + k, is_channel, 0.0), g)
    if residual is not None:
        g += widen(tl.load(residual + at, inside, 0.0))
    tl.store(dz + at, g.to(dz.dtype.element_ty), inside)


@triton.jit
def bn_act_bwd_reduce_kernel(
    dy,
    mask,
    z,
    mean,
    residual,
    res_mean,
    partial,
    count,
    channels,
    pixels,
    tiles_per_split,
    CHANNELS_LAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[0..2, split] = Σ dy', Σ dy'·(z − mean), Σ dy'·(residual − res_mean) of its pixels.

    dy' = dy where the mask bit is set, else 0.
    Grid: one program per split of the pixels and BLOCK_C channels. A split is `tiles_per_split`
    tiles of BLOCK_M pixels. Each lane accumulates in registers; lanes are summed once at the end.
    Bytes moved: dy, z and residual once each, one mask bit per element, splits · channels values
    per sum. AT_ONCE tiles are loaded at a time.
    Why: partial sums in memory instead of atomics give the same bits in every run.
    """
    split = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    centre = tl.load(mean + c, is_channel, 0.0)
    zero = tl.zeros((BLOCK_M, BLOCK_C), centre.dtype)
    sum_dy, sum_dy_z, sum_dy_res = zero, zero, zero
    if residual is not None:
        res_centre = tl.load(res_mean + c, is_channel, 0.0)
    first = split.to(tl.int64) * tiles_per_split * BLOCK_M
    end = tl.minimum(first + tiles_per_split * BLOCK_M, count)
    for tile in range(0, tiles_per_split, AT_ONCE):
        dys, zs, set_bits, residuals = (), (), (), ()
        for i in tl.static_range(AT_ONCE):
            m0 = first + (tile + i) * BLOCK_M
            inside = (m0 + lane < end) & is_channel
            at = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
            dys += (tl.load(dy + at, inside, 0.0),)
            zs += (tl.load(z + at, inside, 0.0),)
            if residual is not None:
                residuals += (tl.load(residual + at, inside, 0.0),)
            if mask is not None:
                on = mask_bits(mask, m0, lane, c0, end, channels, pixels, BLOCK_C, CHANNELS_LAST)
                set_bits += (on,)
        for i in tl.static_range(AT_ONCE):
            g = widen(dys[i])
            if mask is not None:
                g = tl.where(set_bits[i], g, 0.0)
            sum_dy += g
            sum_dy_z += g * (widen(zs[i]) - centre)
            if residual is not None:
                sum_dy_res += g * (widen(residuals[i]) - res_centre)
    splits = tl.num_programs(0)
    out = partial + split * channels + c
    tl.store(out, sum_rows(sum_dy), is_channel)
    tl.store(out + splits * channels, sum_rows(sum_dy_z), is_channel)
    if residual is not None:
        tl.store(out + 2 * splits * channels, sum_rows(sum_dy_res), is_channel)


def bn_act_bwd_reduce(
    dy: Tensor,
    mask: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    res_mean: Tensor | None,
    res_rstd: Tensor | None,
    res_scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """`reference.bn_act_bwd_reduce`: one pass over the tensors, then a merge of partial sums."""
    channels, sums = dy.size(1), 2 if residual is None else 3
    if dy.numel() == 0:
        return tuple(mean.new_zeros(channels if i < 4 or sums > 2 else 0) for i in range(7))
    count, pixels = dy.numel() // channels, dy.size(2) * dy.size(3)
    channels_last = is_channels_last(dy)

    def start(config: Config) -> Tensor:
        elements, per_processor, warps = config
        split = config_select.reduction(elements, per_processor, count, channels, channels_last, dy)
        partial = mean.new_empty(sums, split.splits, channels)
        launch(
            bn_act_bwd_reduce_kernel, split.grid(channels),
            dy, mask, z, mean, residual, res_mean, partial, count, channels, pixels, split.tiles,
            channels_last, AT_ONCE, split.m, split.c, num_warps=warps,
            **all_registers(dy),
        )  # fmt: skip
        return partial

    key = (count, channels, sums, channels_last, dy.dtype)
    partial = start(config_select.choose("bn_act_bwd_reduce", key, REDUCE_CONFIGS, 0, dy, start))
    return merge_sums(partial, rstd, scale, count, res_rstd, res_scale)


def bn_act_bwd_apply(
    dy: Tensor,
    mask: Tensor | None,
    a: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`reference.bn_act_bwd_apply` in one kernel launch."""
    return _apply(dy, mask, a, z, mean, b, c, residual, dy.size(1), None)


def gated_act_bwd_apply(
    dy: Tensor,
    scale: Tensor,
    shift: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    """`reference.gated_act_bwd_apply` in one kernel launch."""
    return _apply(dy, None, scale, z, mean, b, shift, None, *matrix_of(dy))


def _apply(dy, mask, a, z, mean, b, c, residual, channels, pixels):
    dz = torch.empty_like(dy, memory_format=memory_format(dy))
    if dy.numel() == 0:
        return dz
    rows, inner = rows_of(dy)
    channels_last = is_channels_last(dy)

    def start(config: Config) -> None:
        elements, warps = config
        block = config_select.pointwise(elements, inner, dy)
        launch(
            bn_act_bwd_apply_kernel, block.grid(rows, inner),
            dy, mask, a, z, mean, b, c, residual, dz, rows, inner, channels, pixels,
            channels_last, block.r, block.i, num_warps=warps,
        )  # fmt: skip

    inputs = 1 + (b is not None) + (residual is not None)
    key = rows, inner, inputs, dy.dtype
    start(config_select.choose("bn_act_bwd_apply", key, APPLY_CONFIGS, 0, dy, start))
    return dz


def add_relu_bwd(dy: Tensor, mask: Tensor) -> Tensor:
    """`reference.add_relu_bwd` in one kernel launch."""
    return bn_act_bwd_apply(dy, mask, None, None, None, None, None, None)
