"""wgrad, the gradient of a convolution's filters, as implicit GEMM.

GEMM_M = K, GEMM_N = C of one filter tap, GEMM_K = pixels of dz.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from ..spec.dtypes import stats_dtype
from . import config_select
from .config_select import Config
from .conv_cost import boxes_per_split
from .conv_plan import box_of, gradient_key, precision, refuse_tma, wgrad_configs
from .conv_tiles import input_tiles, load_input, load_output, output_tiles, walk
from .launch import all_registers, launch, target
from .reduce_partials import fold
from .sizes import cdiv


@triton.jit
def conv_wgrad_kernel(
    dy,
    x,
    partial,
    N,
    H,
    W,
    P,
    Q,
    channels,
    filters,
    p_tiles,
    q_tiles,
    c_tiles,
    boxes_per_split,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[split] = Σ over its pixels of dyᵀ · x, for each filter tap: [K, R·S, C].

    Grid: axis 0: one program per BLOCK_M filters, tap and BLOCK_N channels; axis 1: splits of
    `boxes_per_split` boxes of pixels. Programs that run together share their pixels in L2.
    Bytes moved: dy and x once from memory (their R·S·C/BLOCK_N and R·S·K/BLOCK_M reads hit L2),
    splits · |w| sums.
    Why: partial sums in memory instead of atomics give the same bits in every run.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    c0 = pid % c_tiles * BLOCK_N
    tap = pid // c_tiles % (R * S)
    k0 = pid // c_tiles // (R * S) * BLOCK_M
    h, v = tap // S * DILATION_H - PAD_H, tap % S * DILATION_W - PAD_W
    BLOCK_K: tl.constexpr = BOX_N * BOX_P * BOX_Q
    m = tl.arange(0, BLOCK_K)[:, None]
    channel = c0 + tl.arange(0, BLOCK_N)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for i in range(boxes_per_split):
        box = split * boxes_per_split + i
        q0 = box % q_tiles * BOX_Q
        p0 = box // q_tiles % p_tiles * BOX_P
        n0 = box // q_tiles // p_tiles * BOX_N
        n, p, q = n0 + m // BOX_Q // BOX_P, p0 + m // BOX_Q % BOX_P, q0 + m % BOX_Q
        there = (n < N) & (p < P) & (q < Q)
        k, source = k0 + tl.arange(0, BLOCK_M)[None, :], (n.to(tl.int64) * P + p) * Q + q
        g = load_output(dy, n0, p0, q0, k0, source, k, filters, there, TMA, BLOCK_K, BLOCK_M)
        row, column = p * STRIDE + h, q * STRIDE + v
        inside = there & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        if STRIDE == 1:
            i0, parity, j0, first = p0 + h, 0, q0 + v, c0
        else:
            i0, parity, j0, first = p0 + (h >> 1), h & 1, q0 + (v >> 1), (v & 1) * channels + c0
        pixel = (n.to(tl.int64) * H + row) * W + column
        e = load_input(
            x, n0, i0, parity, j0, first, pixel, channel, channels, inside, TMA, BLOCK_K, BLOCK_N
        )
        acc = tl.dot(g.T, e, acc, input_precision=PRECISION, out_dtype=WIDE)

    k = k0 + tl.arange(0, BLOCK_M)[:, None]
    at = ((split.to(tl.int64) * filters + k) * (R * S) + tap) * channels + channel
    tl.store(partial + at, acc, (k < filters) & (channel < channels))


def conv_wgrad(
    dy: Tensor, w: Tensor, x: Tensor, conv: Conv, wanted: torch.dtype | None = None
) -> Tensor:
    """dw of z = conv(x, w) as in `reference.conv_bprop`.

    dw is channels_last, of the dtype `wanted`, by default that of w. dy [N,K,P,Q], w [K,C,R,S] and
    x [N,C,H,W] are channels_last and of one dtype; groups is 1, stride is 1 or 2.
    """
    (n, h, width, c), (_, p, q, k) = walk(x, dy, w, conv)
    r, s = w.shape[2:]
    stride, gpu = conv.stride[0], target(x)
    tma = refuse_tma(x, w, conv, dy) is None
    dtype = stats_dtype(x)

    def start(config: Config) -> Tensor:
        block_m, block_n, block_k, warps, stages = config
        block_k = block_k * 2 // x.element_size()
        box = box_of(block_k, n, p, q)
        grid = [cdiv(*pair) for pair in zip((n, p, q, k, c), (*box, block_m, block_n), strict=True)]
        boxes, programs = grid[0] * grid[1] * grid[2], grid[3] * grid[4] * r * s
        per_split = boxes_per_split(boxes, programs, gpu.multiprocessors)
        splits = cdiv(boxes, per_split)
        partial = x.new_empty(splits, k * r * s * c, dtype=dtype)
        moved = [dy, x]
        if tma:
            moved = [
                output_tiles(dy, (n, p, q, k), box, block_m),
                input_tiles(x, (n, h, width, c), stride, box, block_n),
            ]
        launch(
            conv_wgrad_kernel, (programs, splits),
            *moved, partial, n, h, width, p, q, c, k, grid[1], grid[2], grid[4], per_split, r, s,
            stride, *conv.padding, *conv.dilation, precision(x),
            tl.float64 if dtype == torch.float64 else tl.float32, tma, *box, block_m, block_n,
            num_warps=warps, num_stages=stages, **all_registers(x),
        )  # fmt: skip
        return partial

    configs = wgrad_configs(x, w)
    key = gradient_key(x, w, conv)
    partial = start(config_select.choose("conv_wgrad", key, configs, 0, x, start))
    dw = torch.empty_like(w, dtype=wanted, memory_format=torch.channels_last)
    fold(partial, dw)
    return dw
