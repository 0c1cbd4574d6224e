"""BN + ReLU + max-pool in one pass, and the gradient through max-pool and ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Pool
from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format
from . import config_select
from .config_select import Config
from .launch import INTERPRETING, launch
from .reduce_partials import merge_sums
from .sizes import cdiv
from .tile_math import element_offsets, sum_rows, widen

CONFIGS = ((1024, 4), (2048, 8), (512, 4), (512, 2))  # elements per tile, warps
BWD_CONFIGS = ((1024, 16, 4), (2048, 8, 8), (1024, 8, 4), (1024, 16, 8))
# elements per tile, programs per multiprocessor, warps
REGISTERS = 128  # maximum per thread: by default ptxas spills registers for more occupancy
MOST_AT_ONCE = 16


@triton.jit
def _first_image(m0, lane, pixels):
    """Image of pixel m0 (int64), and of each pixel m0 + lane the image relative to it and the pixel
    within its image. Pixels count over all images; one 64-bit scalar carries the size.
    """
    place = (m0 % pixels).to(tl.int32) + lane
    return m0 // pixels, place // pixels, place % pixels


@triton.jit
def _larger(best, code, position, z, scale, shift, at, is_element, h, w, height, width):
    """best and code, or scale·z + shift at row h and column w and its position if larger."""
    inside = is_element & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    v = widen(tl.load(z + at, inside, 0.0))
    if scale is not None:
        v = tl.fma(v, scale, shift)
    larger = inside & ((v > best) | (v != v))
    return tl.where(larger, v, best), tl.where(larger, position, code)


@triton.jit
def bn_relu_max_pool_kernel(
    z,
    scale,
    shift,
    y,
    index,
    z_sn,
    z_sc,
    z_sh,
    z_sw,
    channels,
    height,
    width,
    rows,
    columns,
    count,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = max over R×S windows of relu(scale·z + shift), index = its position r·S + s.

    The maximum starts from 0, which is the ReLU; the first of equal values wins. Terms and results
    whose argument is None are omitted.
    Grid: one program per BLOCK_M of the `count` pixels of y and BLOCK_C channels.
    Bytes moved: z and y once, one index byte per value of y. A value of z is in up to four
    neighbouring 3×3 windows at stride 2; all reads but the first hit L1 or L2.
    Why: fusion saves writing and reading the activation between BN and pool, four times as large as
    y.
    """
    m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    is_element = (m0 + lane < count) & is_channel
    pixels = rows * columns
    image, at, pixel = _first_image(m0, lane, pixels)
    top = pixel // columns * STRIDE_H - PAD_H
    left = pixel % columns * STRIDE_W - PAD_W
    z += image * z_sn
    at = at * z_sn + (c * z_sc + top * z_sh + left * z_sw)
    a, b = None, None
    if scale is not None:
        a, b = tl.load(scale + c, is_channel, 0.0), tl.load(shift + c, is_channel, 0.0)
    wide: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    best = tl.zeros((BLOCK_M, BLOCK_C), wide)
    code = tl.full((BLOCK_M, BLOCK_C), 255, tl.int32)  # reference.NONE: no value above 0
    for p0 in range(0, R * S, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            p = p0 + i
            best, code = _larger(
                best, code, p, z, a, b, at + (p // S * z_sh + p % S * z_sw), is_element,
                top + p // S, left + p % S, height, width,
            )  # fmt: skip
    out = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
    tl.store(y + out, best.to(y.dtype.element_ty), is_element)
    if index is not None:
        tl.store(index + out, code.to(tl.uint8), is_element)


@triton.jit
def _from_window(
    g, dy, index, p, q, r, s, at, is_element, rows, columns, R: tl.constexpr, S: tl.constexpr
):
    """g + dy of window (p, q) where its index names the pixel at its row r and column s, else g."""
    exists = is_element & (p >= 0) & (p < rows) & (q >= 0) & (q < columns) & (r < R) & (s < S)
    chosen = tl.load(index + at, exists, 255).to(tl.int32) == r * S + s
    return g + tl.where(exists & chosen, widen(tl.load(dy + at, exists, 0.0)), 0.0)


@triton.jit
def max_pool_bwd_kernel(
    dy,
    index,
    x,
    mean,
    dx,
    partial,
    y_sn,
    y_sc,
    y_sh,
    y_sw,
    channels,
    height,
    width,
    rows,
    columns,
    count,
    tiles_per_split,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = Σ dy over the windows whose index names the pixel; partial Σdx and Σdx·(x − mean).

    Grid: one program per split of the `count` pixels of x and BLOCK_C channels. A split is
    `tiles_per_split` tiles of BLOCK_M pixels.
    Bytes moved: dx and x once (x only for the sums), dy and index once; their repeated reads, by
    neighbouring pixels, hit L1 or L2.
    Why: each pixel gathers from the windows that contain it (four of 3×3 at stride 2). Without
    atomics a result has the same bits in every run, and dx needs no zeroing and is written once.
    """
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane, is_channel = tl.arange(0, BLOCK_M)[:, None], c < channels
    wide: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    zero = tl.zeros((BLOCK_M, BLOCK_C), wide)
    sum_dx, sum_dx_x = zero, zero
    centre = 0.0
    if mean is not None:
        centre = tl.load(mean + c, is_channel, 0.0)
    across: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    windows: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H * across
    pixels = height * width
    for tile in range(tiles_per_split):
        m0 = (split.to(tl.int64) * tiles_per_split + tile) * BLOCK_M
        is_element = (m0 + lane < count) & is_channel
        image, at, pixel = _first_image(m0, lane, pixels)
        h, w = pixel // width + PAD_H, pixel % width + PAD_W
        p, q, r, s = h // STRIDE_H, w // STRIDE_W, h % STRIDE_H, w % STRIDE_W
        at = at * y_sn + (c * y_sc + p * y_sh + q * y_sw)
        g = zero
        for i0 in range(0, windows, AT_ONCE):
            for j in tl.static_range(AT_ONCE):
                up, back = (i0 + j) // across, (i0 + j) % across
                g = _from_window(
                    g, dy + image * y_sn, index + image * y_sn, p - up, q - back,
                    r + up * STRIDE_H, s + back * STRIDE_W, at - (up * y_sh + back * y_sw),
                    is_element, rows, columns, R, S,
                )  # fmt: skip
        out = element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST)
        tl.store(dx + out, g.to(dx.dtype.element_ty), is_element)
        if mean is not None:
            sum_dx += g
            sum_dx_x += g * (widen(tl.load(x + out, is_element, 0.0)) - centre)
    if mean is not None:
        to = partial + split * channels + c
        tl.store(to, sum_rows(sum_dx), is_channel)
        tl.store(to + tl.num_programs(0) * channels, sum_rows(sum_dx_x), is_channel)


def _elements(elements: int, channels_last: bool) -> int:
    """Elements per tile: half in NCHW, where each element has its own address and coefficients;
    more in the interpreter, which has no registers and whose time depends on the program count.
    """
    elements *= 4 if INTERPRETING else 1
    return elements if channels_last else elements // 2


def _at_once(steps: int) -> int:
    """How many of `steps` positions or windows have loads in flight at once: all if few, else 1."""
    return steps if steps <= MOST_AT_ONCE else 1


def bn_relu_max_pool(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    save_index: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.bn_relu_max_pool` in one kernel launch."""
    fmt, channels = memory_format(z), z.size(1)
    size = Pool(tuple(kernel), tuple(stride), tuple(padding)).output_shape(z.shape)
    y = torch.empty(size, dtype=z.dtype, device=z.device, memory_format=fmt)
    index = torch.empty_like(y, dtype=torch.uint8) if save_index else None
    nothing = z.new_empty(0, dtype=torch.uint8)
    if y.numel() == 0:
        return y, nothing if index is None else index
    channels_last = fmt == torch.channels_last
    count = y.numel() // channels

    def start(config: Config) -> None:
        elements, warps = config
        block = config_select.pixels(_elements(elements, channels_last), channels, channels_last, z)
        launch(
            bn_relu_max_pool_kernel, block.grid(count, channels),
            z, scale, shift, y, index, *z.stride(), channels, *z.shape[2:], *y.shape[2:], count,
            *kernel, *stride, *padding, _at_once(kernel[0] * kernel[1]), channels_last,
            block.r, block.i, num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip

    key = (*z.shape, *kernel, *stride, channels_last, z.dtype)
    start(config_select.choose("bn_relu_max_pool", key, CONFIGS, 0, z, start))
    return y, nothing if index is None else index


def max_pool_bwd(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.max_pool_bwd`: one pass over the tensors, then a merge of partial sums."""
    fmt = memory_format(x)
    dx = torch.empty_like(x, memory_format=fmt)
    channels, sums = x.size(1), 0 if mean is None else x.size(1)
    if x.numel() == 0:
        return dx, *(x.new_zeros(sums, dtype=stats_dtype(x)) for _ in range(2))
    count, channels_last = x.numel() // channels, fmt == torch.channels_last
    windows = cdiv(kernel[0], stride[0]) * cdiv(kernel[1], stride[1])

    def start(config: Config) -> Tensor:
        elements, per_processor, warps = config
        elements = _elements(elements, channels_last)
        split = config_select.reduction(elements, per_processor, count, channels, channels_last, x)
        partial = x.new_empty(2, split.splits if sums else 0, channels, dtype=stats_dtype(x))
        launch(
            max_pool_bwd_kernel, split.grid(channels),
            dy, index, x, mean, dx, partial, *dy.stride(), channels, *x.shape[2:], *dy.shape[2:],
            count, split.tiles, *kernel, *stride, *padding, _at_once(windows), channels_last,
            split.m, split.c, num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip
        return partial

    key = (*x.shape, *kernel, *stride, bool(sums), channels_last, x.dtype)
    partial = start(config_select.choose("max_pool_bwd", key, BWD_CONFIGS, 0, x, start))
    if not sums:
        return dx, partial.new_empty(0), partial.new_empty(0)
    return dx, *merge_sums(partial, rstd, None, count)[:2]
