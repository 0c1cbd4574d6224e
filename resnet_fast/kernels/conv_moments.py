"""Convolution and the batch statistics of its result, by tensor descriptors, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from . import config_select
from .config_select import Config
from .conv_cost import registers_of, tiles_of_program
from .conv_epilogue import columns
from .conv_plan import STATS, box_of, gemm_of, key, moments_configs, precision
from .conv_tiles import filter_tiles, input_tiles, operands, output_tiles, walk
from .launch import launch, target
from .sizes import cdiv
from .tile_math import store_moments, widen

STORE_N = 64  # columns of a stored box


@triton.jit
def _in_a_thread(v, WARPS: tl.constexpr):
    """Sums over those rows of a tile [M, N] that one thread has: [WARPS, 8, N].

    In a product of Hopper, warp i of WARPS has rows 16·i .. 16·i + 15 of every 16·WARPS, and a
    thread has two of them, r and r + 8. So no value moves between threads.
    """
    rows = v.reshape(v.shape[0] // (16 * WARPS), WARPS, 2, 8, v.shape[1])
    return tl.sum(tl.sum(rows, 2), 0)


@triton.jit
def conv_moments_kernel(
    x,
    w,
    y,
    partial,
    N,
    P,
    Q,
    channels,
    filters,
    p_tiles,
    q_tiles,
    k_tiles,
    c_tiles,
    boxes,
    boxes_per_program,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    WARPS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = conv(x, w), and the moments of y as stored over the pixels of each program.

    partial[0..3, program] = n, mean, rest (the rounding error of the mean) and m2 = Σ(v − mean)².
    With p = the mean of the program's first tile, d = v − p, S = Σd and Q = Σd²:

        mean = p + S/n    rest = (p − mean) + S/n    m2 = Q − S²/n

    Accuracy: p is the mean of n₁ of the n values, so n·(mean − p)² ≤ (n/n₁)·m2 (Cauchy-Schwarz).
    Hence Q ≤ (1 + T)·m2 with T = n/n₁, the number of tiles if all are full: the subtraction
    multiplies the relative error of Q by 1 + T at most, whatever mean and deviation the channel
    has. For pixels that do not depend on their place, n₁·(mean − p)² is about the variance and the
    factor is about 1 + 1/n₁.

    The tiles are those of `conv_affine_act_tma_kernel`. One loop walks the steps of all tiles of
    the program; the loads of the next tile run while a tile is stored.
    Grid: one program per BLOCK_N filters and `boxes_per_program` boxes of pixels, filters fastest,
    so that programs that run together share the input in L2. There are at most as many programs as
    the GPU runs at a time, unless there are more columns of tiles. WHOLE: boxes end where the
    images do.
    Bytes moved: x from memory once (its R·S·K/BLOCK_N reads hit L2), w and y once; programs · 4
    vectors of moments.
    Why: sums stay in registers over all tiles, and threads exchange them once per program. That
    exchange takes several times as long as the sums of a tile.
    """
    pid = tl.program_id(0)
    k0 = pid % k_tiles * BLOCK_N
    program = pid // k_tiles
    first = program * boxes_per_program
    end = tl.minimum(first + boxes_per_program, boxes)
    M: tl.constexpr = BOX_N * BOX_P * BOX_Q
    WIDTH: tl.constexpr = BLOCK_N if BLOCK_N < 64 else 64
    m = tl.arange(0, M)[:, None]
    sums = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
    squares = tl.zeros((WARPS, 8, BLOCK_N), tl.float32)
    pivot = tl.zeros((1, BLOCK_N), tl.float32)
    acc = tl.zeros((M, BLOCK_N), tl.float32)
    count, box, tap, c0 = 0, first, 0, -BLOCK_K
    q0 = box % q_tiles * BOX_Q
    p0 = box // q_tiles % p_tiles * BOX_P
    n0 = box // q_tiles // p_tiles * BOX_N
    for _ in range((end - first) * (R * S) * c_tiles):
        c0 += BLOCK_K
        if c0 >= channels:
            c0 = 0
            tap += 1
            if tap == R * S:
                tap = 0
                box += 1
                q0 = box % q_tiles * BOX_Q
                p0 = box // q_tiles % p_tiles * BOX_P
                n0 = box // q_tiles // p_tiles * BOX_N
        a, b = operands(
            x, w, n0, p0, q0, k0, tap, c0, channels, S, STRIDE, PAD_H, PAD_W, DILATION_H,
            DILATION_W, M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if (tap == R * S - 1) & (c0 + BLOCK_K >= channels):
            z = acc.to(y.dtype)
            acc = tl.zeros((M, BLOCK_N), tl.float32)
            parts = columns(z)
            for i in tl.static_range(BLOCK_N // WIDTH):
                part = parts[i].reshape(BOX_N, BOX_P, BOX_Q, WIDTH)
                y.store([n0, p0, q0, k0 + i * WIDTH], part)
            d = widen(z)
            n, p, q = n0 + m // BOX_Q // BOX_P, p0 + m // BOX_Q % BOX_P, q0 + m % BOX_Q
            inside = (n < N) & (p < P) & (q < Q)
            own = M
            if not WHOLE:
                d = tl.where(inside, d, 0.0)
                own = tl.minimum(N - n0, BOX_N) * tl.minimum(P - p0, BOX_P)
                own *= tl.minimum(Q - q0, BOX_Q)
            if box == first:
                pivot = tl.sum(d, 0, keep_dims=True) / own
            count += own
            d -= pivot
            if not WHOLE:
                d = tl.where(inside, d, 0.0)
            sums += _in_a_thread(d, WARPS)
            squares += _in_a_thread(d * d, WARPS)

    total = tl.zeros((1, BLOCK_N), tl.float32) + count
    sums = tl.sum(tl.sum(sums, 1), 0, keep_dims=True)
    squares = tl.sum(tl.sum(squares, 1), 0, keep_dims=True)
    k = k0 + tl.arange(0, BLOCK_N)[None, :]
    programs = tl.num_programs(0) // k_tiles
    store_moments(partial, program, programs, k, filters, total, pivot, sums, squares)


def conv_moments(x: Tensor, w: Tensor, conv: Conv, y: Tensor) -> Tensor:
    """Compute y in place; returns moments [4, programs, K] for `reduce_partials.merge_tiles`."""
    r, s = w.shape[2:]
    gpu, stride = target(x), conv.stride[0]
    (n, h, width, c), (_, p, q, k) = walk(x, y, w, conv)
    gemm = gemm_of(x, w, conv, STATS)

    def start(config: Config) -> Tensor:
        block_m, block_n, block_k, warps, stages, at_once = config
        block_k = block_k * 2 // x.element_size()
        box = box_of(block_m, n, p, q)
        grid = [cdiv(*pair) for pair in zip((n, p, q, k), (*box, block_n), strict=True)]
        boxes = grid[0] * grid[1] * grid[2]
        each = tiles_of_program(boxes, grid[3], gpu.multiprocessors * at_once)
        programs = cdiv(boxes, each)
        partial = x.new_empty(4, programs, k, dtype=torch.float32)
        whole = all(size % side == 0 for size, side in zip((n, p, q), box, strict=True))
        launch(
            conv_moments_kernel, (programs * grid[3],),
            input_tiles(x, (n, h, width, c), stride, box, block_k),
            filter_tiles(w, block_n, block_k),
            output_tiles(y, (n, p, q, k), box, min(block_n, STORE_N)), partial,
            n, p, q, c, k, grid[1], grid[2], grid[3], cdiv(c, block_k), boxes, each,
            r, s, stride, *conv.padding, *conv.dilation, precision(x), whole, warps, *box, block_n,
            block_k, num_warps=warps, num_stages=stages, maxnreg=registers_of(warps, at_once),
        )  # fmt: skip
        return partial

    configs, rule = moments_configs(gemm, gpu)
    where = key(x, w, conv, STATS)
    return start(config_select.choose("conv_moments", where, configs, rule, x, start))
