"""Pointwise forward: BN, BN + ReLU, BN + add + ReLU (one BN or two), add + ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.layout import is_channels_last, mask_shape, memory_format, rows_of
from . import config_select
from .config_select import Config
from .launch import launch
from .tile_math import coefficients_at, pack_bits, relu, widen

CONFIGS = ((4096, 4), (2048, 4), (8192, 8), (2048, 8))  # elements per tile, warps


@triton.jit
def bn_act_fwd_kernel(
    z,
    scale,
    shift,
    residual,
    res_scale,
    res_shift,
    y,
    mask,
    rows,
    inner,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y = relu(scale·z + shift + (res_scale·residual + res_shift)); mask = bits of y > 0 or NaN.

    Terms whose argument is None are omitted. With `pixels` (per image, in NHWC) scale and shift are
    [N,C] (`coefficients_at`).
    Grid: one program per BLOCK_R × BLOCK_I tile of the dense tensor as rows × inner: pixels ×
    channels in NHWC, planes × pixels in NCHW.
    Bytes moved: z, residual and y once each, and one mask bit per element. Only the channel vectors
    are read more than once, and they stay in L2.
    Why: a tile covers whole rows where they fit, so that the eight neighbours that share a mask
    byte sit in one thread's 16-byte load.
    """
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (row0 + r < rows)[:, None] & (i < inner)[None, :]
    at = row0 * inner + (r[:, None] * inner + i[None, :])
    c, is_channel = coefficients_at(row0, r, i, rows, inner, channels, pixels, CHANNELS_LAST)
    v = widen(tl.load(z + at, inside, 0.0))
    if scale is not None:
        v = tl.fma(v, tl.load(scale + c, is_channel, 0.0), tl.load(shift + c, is_channel, 0.0))
    if residual is not None:
        s = widen(tl.load(residual + at, inside, 0.0))
        if res_scale is not None:
            a = tl.load(res_scale + c, is_channel, 0.0)
            s = tl.fma(s, a, tl.load(res_shift + c, is_channel, 0.0))
        v += s
    if RELU:
        if mask is not None:
            width = tl.cdiv(inner, 8)
            b = tl.program_id(1) * (BLOCK_I // 8) + tl.arange(0, BLOCK_I // 8)
            bits = pack_bits(((v > 0) | (v != v)) & inside)
            exists = (row0 + r < rows)[:, None] & (b < width)[None, :]
            tl.store(mask + row0 * width + (r[:, None] * width + b[None, :]), bits, exists)
        v = relu(v)
    tl.store(y + at, v.to(y.dtype.element_ty), inside)


def _run(z, scale, shift, residual, res_scale, res_shift, do_relu, save_mask, per_image=False):
    y = torch.empty_like(z, memory_format=memory_format(z))
    mask = z.new_empty(mask_shape(z) if do_relu and save_mask else 0, dtype=torch.uint8)
    if z.numel() == 0:
        return y, mask
    rows, inner = rows_of(z)
    channels_last = is_channels_last(z)
    channels, pixels = matrix_of(z) if per_image else (z.size(1), None)

    def start(config: Config) -> None:
        elements, warps = config
        block = config_select.pointwise(elements, inner, z)
        launch(
            bn_act_fwd_kernel, block.grid(rows, inner),
            z, scale, shift, residual, res_scale, res_shift, y, mask if mask.numel() else None,
            rows, inner, channels, pixels, channels_last, do_relu, block.r, block.i,
            num_warps=warps,
        )  # fmt: skip

    inputs = 1 + (residual is not None)
    key = rows, inner, inputs, z.dtype
    start(config_select.choose("bn_act_fwd", key, CONFIGS, 0, z, start))
    return y, mask


def bn_act(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    res_scale: Tensor | None,
    res_shift: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.bn_act` in one kernel launch."""
    return _run(z, scale, shift, residual, res_scale, res_shift, relu, save_mask)


def gated_act(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.gated_act` in one kernel launch."""
    return _run(z, scale, shift, residual, None, None, relu, save_mask, per_image=True)


def matrix_of(x: Tensor) -> tuple[int, int | None]:
    """`channels` and `pixels` of kernels whose coefficients are [N,C]; see `coefficients_at`."""
    n, channels, height, width = x.shape
    return (channels, height * width) if is_channels_last(x) else (n * channels, None)


def add_relu(x: Tensor, residual: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    """`reference.add_relu` in one kernel launch."""
    return _run(x, None, None, residual, None, None, True, save_mask)
