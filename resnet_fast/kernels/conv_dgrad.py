"""dgrad, the gradient of a convolution's input, as implicit GEMM with an epilogue.

GEMM_M = pixels of x, GEMM_N = C, GEMM_K = taps · K. One kernel moves its tiles by tensor
descriptors or by pointers, because the geometry is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format, values_per_channel
from . import config_select
from .config_select import Config
from .conv_epilogue import columns
from .conv_plan import (
    GradIn,
    box_of,
    dgrad_configs,
    gradient_key,
    precision,
    refuse_tma,
)
from .conv_tiles import filter_tiles, input_tiles, load_input, load_output, output_tiles, walk
from .launch import all_registers, launch
from .reduce_partials import merge_sums
from .sizes import cdiv
from .tile_math import relu_gate, row_bits, sum_rows, widen

STORE_N = 64  # columns of a stored box


@triton.jit
def conv_dgrad_kernel(
    dy,
    w,
    x,
    residual,
    dx,
    in_scale,
    in_shift,
    in_mean,
    residual_mask,
    partial,
    N,
    H,
    W,
    P,
    Q,
    channels,
    filters,
    h_tiles,
    w_tiles,
    c_tiles,
    k_tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g = (Σ over taps dy · w + residual') where in_scale·x + in_shift > 0, else 0; sums of g.

    residual' is residual where its mask bit is set, else 0. Terms whose argument is None are
    omitted.
    Epilogue: partial[0..1, tile] = Σ g and Σ g·(x − in_mean) over a tile's pixels, from registers,
    before g is rounded.
    Stride 2: a program computes the pixels of one parity (h, w) = (2i + i0, 2j + j0). It visits
    only the taps r with i0 + pad − r even, so that no tap multiplies zeros. x and g are then boxes
    of [N, H/2, 2, W/2, 2·C].
    Grid: one program per box of pixels, parity and BLOCK_N channels, channels fastest, then
    parities, so that programs that run together share dy in L2.
    Bytes moved: dy once (its R·S·C/BLOCK_N reads hit L2), w, x, residual and g once.
    Why: with a separate pass after dgrad, dx would move two more times.
    """
    pid = tl.program_id(0)
    c0 = pid % c_tiles * BLOCK_N
    rest = pid // c_tiles
    parity = rest % (STRIDE * STRIDE)
    h_parity, w_parity = parity // STRIDE, parity % STRIDE
    box = rest // (STRIDE * STRIDE)
    j0 = box % w_tiles * BOX_Q
    i0 = box // w_tiles % h_tiles * BOX_P
    n0 = box // w_tiles // h_tiles * BOX_N
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    m = tl.arange(0, BLOCK_M)[:, None]
    n, i, j = n0 + m // BOX_Q // BOX_P, i0 + m // BOX_Q % BOX_P, j0 + m % BOX_Q
    row, column = i * STRIDE + h_parity, j * STRIDE + w_parity
    inside = (n < N) & (row < H) & (column < W)

    acc = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    first_r, first_s = (h_parity + PAD_H) % STRIDE, (w_parity + PAD_W) % STRIDE
    rows, cols = tl.cdiv(R - first_r, STRIDE), tl.cdiv(S - first_s, STRIDE)
    for step in range(rows * cols * k_tiles):
        tap, k0 = step // k_tiles, step % k_tiles * BLOCK_K
        r, s = first_r + tap // cols * STRIDE, first_s + tap % cols * STRIDE
        up, left = h_parity + PAD_H - r * DILATION_H, w_parity + PAD_W - s * DILATION_W
        if STRIDE == 2:  # even by the choice of r and s; rounded down where negative
            up, left = up >> 1, left >> 1
        p, q = i + up, j + left
        there = (n < N) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        k, source = k0 + tl.arange(0, BLOCK_K)[None, :], (n.to(tl.int64) * P + p) * Q + q
        g = load_output(
            dy, n0, i0 + up, j0 + left, k0, source, k, filters, there, TMA, BLOCK_M, BLOCK_K
        )
        if TMA:
            f = w.load([k0, r * S + s, c0]).reshape(BLOCK_K, BLOCK_N)
        else:
            k = k0 + tl.arange(0, BLOCK_K)[:, None]
            v = c0 + tl.arange(0, BLOCK_N)[None, :]
            at = (k.to(tl.int64) * (R * S) + r * S + s) * channels + v
            f = tl.load(w + at, (k < filters) & (v < channels), 0.0)
        acc = tl.dot(g, f, acc, input_precision=PRECISION, out_dtype=WIDE)

    parts = columns(acc)
    WIDTH: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64
    pixel = (n.to(tl.int64) * H + row) * W + column
    for part in tl.static_range(BLOCK_N // WIDTH):
        first = c0 + part * WIDTH
        v = first + tl.arange(0, WIDTH)[None, :]
        is_channel, at = v < channels, w_parity * channels + first
        d = parts[part]
        if residual is not None:
            more = widen(load_input(
                residual, n0, i0, h_parity, j0, at, pixel, v, channels, inside, TMA, BLOCK_M, WIDTH
            ))  # fmt: skip
            if residual_mask is not None:
                on = row_bits(residual_mask, pixel, inside, first, channels, WIDTH)
                more = tl.where(on, more, 0.0)
            d += more
        if in_scale is not None:
            h = widen(load_input(
                x, n0, i0, h_parity, j0, at, pixel, v, channels, inside, TMA, BLOCK_M, WIDTH
            ))  # fmt: skip
            d = relu_gate(d, h, in_scale, in_shift, v, is_channel)
            if in_mean is not None:
                d = tl.where(inside, d, 0.0)
                centred = h - tl.load(in_mean + v, is_channel, 0.0)
                out = partial + (tl.full((), 0, tl.int64) + rest) * channels + v
                plane = (tl.full((), 0, tl.int64) + tl.num_programs(0) // c_tiles) * channels
                tl.store(out, sum_rows(d), is_channel)
                tl.store(out + plane, sum_rows(d * centred), is_channel)
        if TMA:
            stored = d.to(dx.dtype).reshape(BOX_N, BOX_P, 1, BOX_Q, WIDTH)
            dx.store([n0, i0, h_parity, j0, at], stored)
        else:
            stored = d.to(dx.dtype.element_ty)
            tl.store(dx + (pixel * channels + v), stored, inside & is_channel)


def conv_dgrad(
    dy: Tensor, w: Tensor, x: Tensor, conv: Conv, grad_in: GradIn
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """dx of z = conv(φ(x), w) as in `reference.conv_bprop`, with its epilogue.

    dy [N,K,P,Q], w [K,C,R,S], x [N,C,H,W] are channels_last and of one dtype. groups is 1; stride
    is 1, or 2 without dilation. With `grad_in.mean` also Σdx, Σdx·xhat(x), b and c, else None.
    """
    (n, h, width, c), (_, p, q, k) = walk(x, dy, w, conv)
    r, s = w.shape[2:]
    stride = conv.stride[0]
    tma = refuse_tma(x, w, conv, dy, grad_in.residual) is None
    tma = tma and (stride == 1 or c % STORE_N == 0)  # no box may reach into the other parity
    dx = torch.empty_like(x, memory_format=memory_format(x, w))
    dtype = stats_dtype(x)

    def start(config: Config) -> Tensor | None:
        partial = None
        block_m, block_n, block_k, warps, stages = config
        block_k = block_k * 2 // x.element_size()
        rows, cols = cdiv(h, stride), cdiv(width, stride)
        box = box_of(block_m, n, rows, cols)
        grid = [cdiv(*pair) for pair in zip((n, rows, cols, c), (*box, block_n), strict=True)]
        boxes = grid[0] * grid[1] * grid[2] * stride * stride
        if grad_in.mean is not None:
            partial = x.new_empty(2, boxes, c, dtype=dtype)
        moved = [dy, w, x if grad_in.scale is not None else None, grad_in.residual, dx]
        if tma:
            columns = min(block_n, STORE_N)
            as_input = [
                None if t is None else input_tiles(t, (n, h, width, c), stride, box, columns)
                for t in moved[2:]
            ]
            dy_tiles = output_tiles(dy, (n, p, q, k), box, block_k)
            moved = [dy_tiles, filter_tiles(w, block_k, block_n), *as_input]
        launch(
            conv_dgrad_kernel, (boxes * grid[3],),
            *moved, grad_in.scale, grad_in.shift, grad_in.mean, grad_in.residual_mask,
            partial, n, h, width, p, q, c, k, grid[1], grid[2], grid[3],
            cdiv(k, block_k), r, s, stride, *conv.padding, *conv.dilation,
            precision(x), tl.float64 if dtype == torch.float64 else tl.float32, tma, *box, block_n,
            block_k, num_warps=warps, num_stages=stages, **all_registers(x),
        )  # fmt: skip
        return partial

    configs, rule = dgrad_configs(x, w, conv, tma)
    key = gradient_key(x, w, conv, grad_in)
    partial = start(config_select.choose("conv_dgrad", key, configs, rule, x, start))
    if partial is None:
        return dx, None
    count = values_per_channel(x)
    return dx, merge_sums(partial, grad_in.rstd, grad_in.scale, count)[:4]
