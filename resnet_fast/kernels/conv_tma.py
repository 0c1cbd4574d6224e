"""Convolution as implicit GEMM by tensor descriptors (TMA, Hopper and later)."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from . import config_select
from .config_select import Config
from .conv_epilogue import affine, columns, computed_here, epilogue
from .conv_plan import Fusion, Source, box_of, forward_configs, gemm_of, key, precision
from .conv_split import is_last, meeting_place, share, sum_of_parts, with_splits
from .conv_tiles import Box, filter_tiles, input_tiles, operands, output_tiles, walk
from .launch import INTERPRETING, all_registers, launch, target
from .sizes import cdiv

STORE_N = 64  # columns of a stored box


@triton.jit
def _products(
    acc, x, w, begin, end, n0, p0, q0, k0, channels, c_tiles, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [M, N] plus the products of steps [begin, end) of GEMM_K, by tap and then by channel."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    for i in range(begin, end):
        if R * S == 1:
            tap, c0 = 0, i * BLOCK_K
        else:
            tap, c0 = i // c_tiles, i % c_tiles * BLOCK_K
        a, b = operands(
            x, w, n0, p0, q0, k0, tap, c0, channels, S, STRIDE, PAD_H, PAD_W, DILATION_H,
            DILATION_W, M, N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def conv_affine_act_tma_kernel(
    x,
    w,
    residual,
    y,
    scale,
    shift,
    sums,
    counters,
    source,
    source_w,
    source_scale,
    source_shift,
    channels,
    filters,
    source_channels,
    p_tiles,
    q_tiles,
    k_tiles,
    c_tiles,
    source_tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = relu(scale·conv(x, w) + shift + residual) by tensor descriptors.

    Epilogue: one multiply-add, residual and ReLU per value, 64 columns after another, because the
    vectors of all columns do not fit into the registers. With `source` the residual is its
    projection, source_scale·conv1x1(source, source_w) + source_shift, computed first and kept in
    registers: in the dtype of y, as it would be in memory, or with a split in fp32.

    x is described as [N, H, 1, W, C], for stride 2 as its parities [N, H/2, 2, W/2, 2·C]. Thus for
    a filter tap (r, s) the input of a box of BOX_N × BOX_P × BOX_Q output pixels is a box too; so
    is source. w is [K, R·S, C], residual and y are [N, P, Q, K].
    Grid: axis 0: one program per box of pixels and BLOCK_N filters, filters fastest, so that
    programs that run together share the input in L2; axis 1: the SPLIT parts of GEMM_K
    (`conv_split`), whose first steps are those of source.
    Bytes moved: x from memory once (its R·S·K/BLOCK_N reads hit L2), w, residual and y once; with a
    split also the partial sums, into L2 and out of it. A projection writes and reads nothing.
    Why: descriptors load elements outside as zero, which is the padding, and do not store them. The
    kernel needs no pointer, mask or division per element. Tiles of up to 128 × 128 (128 × 64 with
    source) take less than half of a multiprocessor's registers and shared memory, so that the loads
    and stores of one program run while another multiplies.
    """
    pid = tl.program_id(0)
    k0 = pid % k_tiles * BLOCK_N
    box = pid // k_tiles
    q0 = box % q_tiles * BOX_Q
    p0 = box // q_tiles % p_tiles * BOX_P
    n0 = box // q_tiles // p_tiles * BOX_N
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    WIDTH: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64
    COLUMNS: tl.constexpr = BLOCK_N // WIDTH
    k = k0 + tl.arange(0, WIDTH)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = R * S * c_tiles
    if source is not None:
        steps += source_tiles
    begin, end = share(steps, tl.program_id(1), SPLIT)
    skips = ()
    if source is not None:
        acc = _products(
            acc, source, source_w, begin, min(end, source_tiles), n0, p0, q0, k0, source_channels,
            source_tiles, 1, 1, SOURCE_STRIDE, 0, 0, 1, 1, PRECISION, BLOCK_K,
        )  # fmt: skip
        parts = columns(acc)
        for i in tl.static_range(COLUMNS):
            if SPLIT == 1:
                part = affine(parts[i], k + i * WIDTH, filters, source_scale, source_shift)
                skips += (computed_here(part.to(y.dtype), INTERPRETED),)
            else:
                skips += (affine(parts[i], k + i * WIDTH, filters, source_scale, None),)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        begin, end = max(begin - source_tiles, 0), end - source_tiles
    acc = _products(
        acc, x, w, begin, end, n0, p0, q0, k0, channels, c_tiles, R, S, STRIDE, PAD_H, PAD_W,
        DILATION_H, DILATION_W, PRECISION, BLOCK_K,
    )  # fmt: skip

    if SPLIT > 1:
        if source is not None:  # one sum of both convolutions; the shifts are added at the end
            acc = affine(acc, k, filters, scale, None) + skips[0]
        if not is_last(acc, sums, counters, pid, tl.program_id(1), SPLIT):
            return
        acc = sum_of_parts(acc, sums, pid, SPLIT)
        if source is not None:
            acc = affine(acc, k, filters, None, source_shift)
            scale = None
    parts = columns(acc)
    for i in tl.static_range(COLUMNS):
        first = k0 + i * WIDTH
        s = None
        if residual is not None:
            s = residual.load([n0, p0, q0, first]).reshape(BLOCK_M, WIDTH)
        if source is not None and SPLIT == 1:
            s = skips[i]
        part = epilogue(parts[i], s, k + i * WIDTH, filters, scale, shift, RELU).to(y.dtype)
        y.store([n0, p0, q0, first], part.reshape(BOX_N, BOX_P, BOX_Q, WIDTH))


def _source_tiles(
    source: Source, pixels: tuple[int, int, int], box: Box, config: Config
) -> tuple[tuple[Any, ...], int, int]:
    """The kernel's arguments for a projected residual, its channels, and their number of tiles."""
    x, (n, p, q), stride = source.x, pixels, source.stride
    c, block_n, block_k = x.size(1), config[1], config[2] * 2 // x.element_size()
    tiles = input_tiles(x, (n, p * stride, q * stride, c), stride, box, block_k)
    filters = filter_tiles(source.w, block_n, block_k)
    return (tiles, filters, source.scale, source.shift), c, cdiv(c, block_k)


def by_descriptors(x: Tensor, w: Tensor, conv: Conv, f: Fusion, y: Tensor) -> None:
    """Compute y in place."""
    r, s = w.shape[2:]
    gpu, stride = target(x), conv.stride[0]
    whole = f.source is None or f.source.stride == 1
    (n, h, width, c), (_, p, q, k) = walk(x, y, w, conv, whole)

    def start(config: Config) -> None:
        block_m, block_n, block_k, warps, stages, split = config
        block_k = block_k * 2 // x.element_size()
        box = box_of(block_m, n, p, q)
        columns = min(block_n, STORE_N)
        x_tiles = input_tiles(x, (n, h, width, c), stride, box, block_k)
        w_tiles = filter_tiles(w, block_n, block_k)
        y_tiles = output_tiles(y, (n, p, q, k), box, columns)
        residual = f.residual
        if residual is not None:
            residual = output_tiles(residual, (n, p, q, k), box, columns)
        beside, source_c, source_tiles, source_stride = (None,) * 4, 1, 0, 1
        if f.source is not None:
            beside, source_c, source_tiles = _source_tiles(f.source, (n, p, q), box, config)
            source_stride = f.source.stride
        sizes, blocks = (n, p, q, k), (*box, block_n)
        grid = [cdiv(*pair) for pair in zip(sizes, blocks, strict=True)]
        programs = math.prod(grid)
        meeting = meeting_place(x, programs, block_m, block_n, split)
        launch(
            conv_affine_act_tma_kernel, (programs, split),
            x_tiles, w_tiles, residual, y_tiles, f.scale, f.shift, *meeting, *beside,
            c, k, source_c, grid[1], grid[2], grid[3], cdiv(c, block_k),
            source_tiles, r, s, stride, *conv.padding, *conv.dilation, source_stride, f.relu,
            precision(x), *box, block_n, block_k, split, INTERPRETING, num_warps=warps,
            num_stages=stages, **all_registers(x),
        )  # fmt: skip

    configs = forward_configs(f, k, gpu.shared)
    gemm = gemm_of(x, w, conv, f)
    configs, rule = with_splits(configs, gemm, gpu.multiprocessors, gpu.shared)
    where = key(x, w, conv, f)
    start(config_select.choose("conv_affine_act_tma", where, configs, rule, x, start))
