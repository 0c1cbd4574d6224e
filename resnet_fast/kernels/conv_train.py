"""Convolutions of a training step, each by a Triton kernel or by PyTorch (cuDNN on a GPU).

A Triton forward is one launch: the convolution, with the statistics of its result. A Triton
backward is two: dgrad's epilogue applies the ReLU's gradient and sums for the previous
normalization. Passes before them compute φ(x) and dz. cuDNN runs between separate Triton passes
that do the rest.

`conv_plan` lists the plans that a layer may take; `config_select` chooses one, as it does a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from ..spec.dtypes import stats_dtype
from ..spec.layout import is_channels_last, memory_format, values_per_channel
from . import config_select
from .bn_act import bn_act
from .bn_act_bwd import bn_act_bwd_apply
from .bn_stats import bn_stats_finalized
from .config_select import Config
from .conv import conv_bn_act, conv_fused
from .conv_dgrad import conv_dgrad
from .conv_plan import (
    LIBRARY,
    PLANS,
    STATS,
    GradIn,
    Plan,
    backward_plans,
    forward_plans,
    gradient_key,
    key,
)
from .conv_wgrad import conv_wgrad
from .launch import all_registers, launch
from .reduce_partials import merge_sums, merge_tiles
from .tile_math import element_offsets, mask_bits, relu_gate, sum_rows, widen

CONFIGS = ((2048, 4, 8), (2048, 8, 8), (1024, 8, 4), (1024, 16, 4))
# elements per tile, programs per multiprocessor, warps
AT_ONCE = 2  # tiles: the loads of a multiprocessor in flight cover latency times bandwidth


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
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = (dx + residual') where scale·x + shift > 0, else 0; partial sums of g and g·(x − mean).

    residual' is residual where its mask bit is set, else 0. Terms whose argument is None are
    omitted. Grid, tiles and sums: as in `bn_act_bwd_reduce_kernel`.
    Bytes moved: dx, x, residual and g once each, and one mask bit per element. AT_ONCE tiles are
    loaded at a time.
    Why: it follows cuDNN's dgrad. The epilogue of `conv_dgrad` saves writing and reading dx.
    """
    split = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    wide: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    sum_g = tl.zeros((BLOCK_M, BLOCK_C), wide)
    sum_g_x = tl.zeros((BLOCK_M, BLOCK_C), wide)
    first = split.to(tl.int64) * tiles_per_split * BLOCK_M
    end = tl.minimum(first + tiles_per_split * BLOCK_M, count)
    for tile in range(0, tiles_per_split, AT_ONCE):
        ds, xs, residuals, set_bits = (), (), (), ()
        for i in tl.static_range(AT_ONCE):
            m0 = first + (tile + i) * BLOCK_M
            inside = (m0 + lane < end) & is_channel
            at = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
            ds += (tl.load(dx + at, inside, 0.0),)
            if scale is not None:
                xs += (tl.load(x + at, inside, 0.0),)
            if residual is not None:
                residuals += (tl.load(residual + at, inside, 0.0),)
            if residual_mask is not None:
                on = mask_bits(
                    residual_mask, m0, lane, c0, end, channels, pixels, BLOCK_C, CHANNELS_LAST
                )
                set_bits += (on,)
        for i in tl.static_range(AT_ONCE):
            m0 = first + (tile + i) * BLOCK_M
            inside = (m0 + lane < end) & is_channel
            d = widen(ds[i])
            if residual is not None:
                more = widen(residuals[i])
                if residual_mask is not None:
                    more = tl.where(set_bits[i], more, 0.0)
                d += more
            if scale is not None:
                v = widen(xs[i])
                d = relu_gate(d, v, scale, shift, c, is_channel)
                if mean is not None:
                    sum_g += tl.where(inside, d, 0.0)
                    centred = v - tl.load(mean + c, is_channel, 0.0)
                    sum_g_x += tl.where(inside, d * centred, 0.0)
            at = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
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
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, ...]:
    """`reference.conv_fprop`: a pass for φ(x), then a launch and the merge of its statistics, or
    PyTorch's convolution and a pass for them. A bias, residual or ReLU runs in `conv_bn_act`.

    Why a pass: a tile of x is read once per tile of filters and tap, and would be normalized each
    time, between a load and the tensor cores (`bench estimate`, and cuDNN's plan on an H200).
    """
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    fusion = STATS._replace(stats=stats, residual=residual, relu=relu)

    def activated() -> Tensor:
        if in_scale is None:
            return x
        return bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]

    if not stats and (bias is not None or residual is not None or relu):
        rest = None, None, None, None, residual, relu, 0.0, stride, padding, dilation, groups
        z = conv_bn_act(activated(), w, bias, *rest)
        return z, *(x.new_empty(0, dtype=stats_dtype(x)) for _ in range(5))

    def start(plan: Config) -> tuple[Tensor, ...]:
        h = activated()
        if plan == LIBRARY:
            z = F.conv2d(h, w.to(x.dtype), None, *conv.args())
            z, partial = z.contiguous(memory_format=memory_format(h, w)), None
        else:
            z, partial = conv_fused(h, w.to(x.dtype), conv, fusion)
        if not stats:
            return z, *(x.new_empty(0, dtype=stats_dtype(x)) for _ in range(5))
        if partial is not None:
            return z, *merge_tiles(partial, values_per_channel(z), weight, bias, eps)
        return z, *bn_stats_finalized(z, weight, bias, eps)

    where = key(x, w, conv, fusion, in_scale is not None)
    plans, rule, why = forward_plans(x, w, conv, fusion, training=True)
    return start(config_select.choose("conv_fprop", where, plans, rule, x, start, why))


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
    wide_dw: bool,
) -> tuple[Tensor, ...]:
    """`reference.conv_bprop`: passes for dz and φ(x), then a launch for each gradient and the merge
    of their sums, or another `Plan`.

    Why passes: dgrad and wgrad read a tile of dz once per tap and tile of the other operand. On
    load they would compute it each time, between a load and the tensor cores: by estimate 7 ms of a
    training step of ResNet-50. An H200 ran every convolution of it faster with passes.
    """
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    grad_in = GradIn(in_scale, in_shift, in_mean, in_rstd, residual, residual_mask)
    dtype = stats_dtype(x) if wide_dw else w.dtype
    if any(t is not None for t in (dy_mask, a, b)):
        dy = bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c, None)
    seen = x if in_act is None else in_act
    if in_act is None and in_scale is not None and need_dw:
        seen = bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]
    filters = w.to(x.dtype).contiguous(memory_format=memory_format(x, w))

    def start(plan: Config) -> tuple[Tensor | None, Tensor | None, Any]:
        need = need_dx, need_dw
        return _gradients(Plan(*plan), dy, filters, x, seen, conv, grad_in, *need, dtype)

    if x.numel() == 0 or dy.numel() == 0:
        dx, dw, sums = start(PLANS[-1])
    else:
        needs = f"{'dx' * need_dx}{'dw' * need_dw}"
        where = (*gradient_key(x, w, conv, grad_in), needs)
        plans, rule, why = backward_plans(x, w, conv, grad_in)
        dx, dw, sums = start(config_select.choose("conv_bprop", where, plans, rule, x, start, why))
    empty = [x.new_empty(0, dtype=stats_dtype(x)) for _ in range(4)]
    dx = dx if need_dx else x.new_empty(0)
    if need_dw:
        dw = dw.to(dtype).contiguous(memory_format=memory_format(w))
    else:
        dw = w.new_empty(0, dtype=dtype)
    return dx, dw, *(empty if sums is None else sums)


def _gradients(plan, dy, w, x, seen, conv, grad_in, need_dx, need_dw, dtype):
    """dx, dw, sums by `plan`; dx includes the epilogue of `grad_in`. seen is φ(x), for dw."""
    dx = dw = sums = None
    if need_dw and plan.wgrad:
        dw = conv_wgrad(dy, w, seen, conv, dtype)
    if need_dx and plan.dgrad:
        dx, sums = conv_dgrad(dy, w, x, conv, grad_in)
    by_library = [need_dx and not plan.dgrad, need_dw and not plan.wgrad]
    if any(by_library):
        args = (list(conv.stride), list(conv.padding), list(conv.dilation), False, [0, 0])
        grads = torch.ops.aten.convolution_backward(
            dy, seen, w, None, *args, conv.groups, [*by_library, False]
        )
        dw = grads[1] if by_library[1] else dw
        if by_library[0]:
            dx = grads[0].contiguous(memory_format=memory_format(x, w))
            if grad_in.scale is not None or grad_in.residual is not None:
                dx, sums = dgrad_epilogue(dx, x, *grad_in)
    return dx, dw, sums


def dgrad_epilogue(
    dx: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """dx + residual where scale·x + shift > 0, else 0, and with `mean` its sums, b and c.

    residual counts where its mask is set. These are the last steps of `reference.conv_bprop`, in
    one pass.
    """
    channels = x.size(1)
    if dx.numel() == 0:
        return dx, None if mean is None else tuple(torch.zeros_like(mean) for _ in range(4))
    count, pixels = dx.numel() // channels, dx.size(2) * dx.size(3)
    channels_last = is_channels_last(dx)
    g = torch.empty_like(dx)

    def start(config: Config) -> Tensor | None:
        elements, per_processor, warps = config
        split = config_select.reduction(elements, per_processor, count, channels, channels_last, dx)
        partial = None if mean is None else mean.new_empty(2, split.splits, channels)
        launch(
            dgrad_epilogue_kernel, split.grid(channels),
            dx, x, scale, shift, mean, residual, residual_mask, g, partial, count, channels,
            pixels, split.tiles, channels_last, AT_ONCE, split.m, split.c, num_warps=warps,
            **all_registers(dx),
        )  # fmt: skip
        return partial

    key = (count, channels, residual is not None, mean is not None, channels_last, dx.dtype)
    partial = start(config_select.choose("dgrad_epilogue", key, CONFIGS, 0, dx, start))
    if partial is None:
        return g, None
    return g, merge_sums(partial, rstd, scale, count)[:4]
