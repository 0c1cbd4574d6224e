"""Convolutions of a training step.

Forward: the previous normalization and ReLU on load and the statistics on store of one launch, or
the library's convolution (cuDNN on a GPU) between a pass of ours before and one after. Backward:
the library's gradients, one pass before them and one after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..chain import Conv
from ..layout import is_channels_last, memory_format
from ..reference import stats_dtype
from . import tiles
from .bn_act import bn_act
from .bn_act_bwd import bn_act_bwd_apply
from .bn_stats import bn_stats
from .conv import conv_fused
from .conv_plan import Fusion, refuse_tma
from .lanes import element_offsets, mask_bits, sum_rows, widen
from .launch import launch
from .merge import merge_sums, merge_tiles

CONFIGS = ((4096, 4, 8), (2048, 8, 4), (4096, 2, 8), (2048, 4, 8))
# elements of a tile, programs a multiprocessor, warps


@triton.jit
def dgrad_epilogue_kernel(
    dx,
    x,
    scale,
    shift,
    mean,
    residual,
    residual_mask,
    g,
    partial,
    count,
    channels,
    pixels,
    tiles_per_split,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = (dx + residual') where scale·x + shift > 0, else 0; partial sums of g and g·(x − mean).

    residual' is residual where its mask's bit is set; what is None is left out. Grid, tiles and
    sums as `bn_act_bwd_reduce_kernel`'s. Bytes moved: dx, x, residual and g once each, one bit an
    element for the mask: what the dgrad's own epilogue would save is dx's way out and back.
    """
    split = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    wide: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), wide)
    sum_g_x = tl.zeros((BLOCK_M, BLOCK_C), wide)
    for tile in range(tiles_per_split):
        m0 = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_M
        inside = (m0 + lane < count) & is_channel
        at = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
        d = widen(tl.load(dx + at, inside, 0.0))
        if residual is not None:
            more = widen(tl.load(residual + at, inside, 0.0))
            if residual_mask is not None:
                on = mask_bits(
                    residual_mask, m0, lane, c0, count, channels, pixels, BLOCK_C, CHANNELS_LAST
                )
                more = tl.where(on, more, 0.0)
            d += more
        if scale is not None:
            v = widen(tl.load(x + at, inside, 0.0))
            a = tl.load(scale + c, is_channel, 0.0)
            d = tl.where(tl.fma(v, a, tl.load(shift + c, is_channel, 0.0)) <= 0, 0.0, d)
            if mean is not None:
                sum_g += tl.where(inside, d, 0.0)
                centred = v - tl.load(mean + c, is_channel, 0.0)
                sum_g_x += tl.where(inside, d * centred, 0.0)
        tl.store(g + at, d.to(g.dtype.element_ty), inside)
    if mean is not None:
        out = partial + split * channels + c
        tl.store(out, sum_rows(sum_g), is_channel)
        tl.store(out + tl.num_programs(0) * channels, sum_rows(sum_g_x), is_channel)


def conv_fprop(
    x: Tensor,
    w: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    stats: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.conv_fprop`: one launch and the merging of its statistics, or by the library."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    if by_library(x, w, conv):
        return _library_fprop(x, w, in_scale, in_shift, stats, stride, padding, dilation, groups)
    fusion = Fusion(in_scale=in_scale, in_shift=in_shift, relu=False, stats=stats)
    z, partial = conv_fused(x, w.to(x.dtype), conv, fusion)
    size = w.size(0) if stats else 0
    if partial is None:  # none are wanted, or the batch is empty
        return z, *(x.new_zeros(size, dtype=stats_dtype(x)) for _ in range(2))
    return z, *merge_tiles(partial)


def by_library(x: Tensor, w: Tensor, conv: Conv) -> bool:
    """Whether the library's convolution, with a pass before and after it, is the one to take.

    The rule until tables are measured: the descriptor kernel where it can, else the library; in
    double the pointer kernel, whose use is to be checked.
    """
    return x.dtype != torch.float64 and refuse_tma(x, w, conv) is not None


def _library_fprop(x, w, in_scale, in_shift, stats, stride, padding, dilation, groups):
    """`bn_act`, the library's convolution, `bn_stats`."""
    fmt = memory_format(x, w)
    h = x if in_scale is None else bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]
    z = F.conv2d(h, w.to(x.dtype), None, stride, padding, dilation, groups)
    z = z.contiguous(memory_format=fmt)
    if stats:
        return z, *bn_stats(z)
    return z, *(x.new_empty(0, dtype=stats_dtype(x)) for _ in range(2))


def conv_bprop(
    dy: Tensor,
    w: Tensor,
    x: Tensor,
    dy_mask: Tensor | None,
    a: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_mean: Tensor | None,
    in_rstd: Tensor | None,
    in_act: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.conv_bprop`: `bn_act_bwd_apply`, the library's gradients, one pass over dx."""
    fmt = memory_format(x, w)
    dz = dy
    if dy_mask is not None or a is not None:
        dz = bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c, None)
    h = x if in_act is None else in_act
    if in_act is None and in_scale is not None and need_dw:
        h = bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, h, w.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups,
        [need_dx, need_dw, False],
    )  # fmt: skip
    dw = dw.to(w.dtype) if need_dw else w.new_empty(0)
    empty = x.new_empty(0, dtype=stats_dtype(x))
    if not need_dx:
        return x.new_empty(0), dw, empty, empty.clone()
    dx = dx.contiguous(memory_format=fmt)
    if in_scale is None and residual is None:
        return dx, dw, empty, empty.clone()
    g, sums = dgrad_epilogue(dx, x, in_scale, in_shift, in_mean, in_rstd, residual, residual_mask)
    return g, dw, *((empty, empty.clone()) if sums is None else sums)


def dgrad_epilogue(
    dx: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(dx + residual under its mask) under the ReLU of scale·x + shift; its sums where `mean` is.

    The last steps of `reference.conv_bprop`, in one pass.
    """
    channels = x.size(1)
    if dx.numel() == 0:
        return dx, None if mean is None else (torch.zeros_like(mean), torch.zeros_like(mean))
    count, pixels = dx.numel() // channels, dx.size(2) * dx.size(3)
    channels_last = is_channels_last(dx)
    g, partial = torch.empty_like(dx), None

    def start(config: tuple[int, ...]) -> None:
        nonlocal partial
        elements, per_processor, warps = config
        split = tiles.reduction(elements, per_processor, count, channels, channels_last, dx)
        partial = None if mean is None else mean.new_empty(2, split.splits, channels)
        launch(
            dgrad_epilogue_kernel, split.grid(channels),
            dx, x, scale, shift, mean, residual, residual_mask, g, partial, count, channels,
            pixels, split.tiles, channels_last, split.m, split.c, num_warps=warps,
        )  # fmt: skip

    key = (count, channels, residual is not None, mean is not None, channels_last, dx.dtype)
    tiles.run("dgrad_epilogue", key, CONFIGS, 0, dx, start)
    if partial is None:
        return g, None
    return g, merge_sums(partial, rstd, None)[:2]
