"""One launch for conv + BN + add + ReLU: implicit GEMM on NHWC with everything in its epilogue.

GEMM_M = N·P·Q output pixels, GEMM_N = K filters, GEMM_K = R·S·C. Two kernels share one epilogue:
tiles of the 4-D tensors by descriptors (TMA, Hopper and later) and gathers by pointers (any GPU,
layout, dtype and geometry).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chain import Conv
from ..layout import memory_format
from . import tiles
from .lanes import relu, widen
from .launch import launch, target

# GEMM_M, GEMM_N, GEMM_K of a tile (GEMM_K in 2-byte elements), warps, stages of the pipeline
CONFIGS = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 5),
    (64, 32, 64, 4, 5),
)
POINTER_CONFIGS = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 32, 64, 4, 3),
)
FLAT_CONFIGS = ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (64, 16, 32, 4, 3))
IEEE_CONFIGS = ((64, 64, 32, 8, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 3))
DOUBLE_CONFIGS = ((64, 64, 128, 8, 2), (32, 32, 64, 4, 2))
Configs = tuple[tuple[int, ...], ...]
STORE_N = 64  # columns that the epilogue holds at a time: more, and its vectors spill


@triton.jit
def _epilogue(acc, residual, k, filters, vectors, EPS: tl.constexpr, RELU: tl.constexpr):
    """relu(scale·acc + shift + res_scale·residual + res_shift); what is None is left out.

    scale = bn_weight/√(var + eps), shift = bn_bias − (mean − bias)·scale, of the rounded scale and
    rounded once: what `bn_finalize` would give, made here from BLOCK_N values instead of a launch.
    """
    bias, bn_weight, bn_bias, mean, var, res_scale, res_shift = vectors
    inside = k < filters
    if mean is not None:
        v = tl.load(var + k, inside, 1.0).to(acc.dtype) + EPS
        if acc.dtype == tl.float64:
            scale = 1.0 / tl.sqrt(v)
        else:
            scale = tl.div_rn(tl.full(v.shape, 1.0, tl.float32), tl.sqrt_rn(v))
        if bn_weight is not None:
            scale *= tl.load(bn_weight + k, inside, 0.0).to(acc.dtype)
        centre = tl.load(mean + k, inside, 0.0).to(acc.dtype)
        if bias is not None:
            centre -= tl.load(bias + k, inside, 0.0).to(acc.dtype)
        shift = tl.zeros_like(centre)
        if bn_bias is not None:
            shift += tl.load(bn_bias + k, inside, 0.0).to(acc.dtype)
        acc = tl.fma(acc, scale, tl.fma(-centre, scale, shift))
    elif bias is not None:
        acc += tl.load(bias + k, inside, 0.0).to(acc.dtype)
    if residual is not None:
        s = widen(residual)
        if res_scale is not None:
            s = tl.fma(s, tl.load(res_scale + k, inside, 0.0), tl.load(res_shift + k, inside, 0.0))
        acc += s
    if RELU:
        acc = relu(acc)
    return acc


@triton.jit
def _halves(acc):
    """Columns of acc [M, N] in two: [M, N/2] each."""
    return tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _store_box(
    acc, residual, y, n0, p0, q0, k0, filters, vectors, EPS: tl.constexpr, RELU: tl.constexpr,
    BOX_N: tl.constexpr, BOX_P: tl.constexpr, BOX_Q: tl.constexpr,
):  # fmt: skip
    """The epilogue of a box of pixels and the filters from k0, and its store by descriptor."""
    k = k0 + tl.arange(0, acc.shape[1])[None, :]
    s = None
    if residual is not None:
        s = residual.load([n0, p0, q0, k0]).reshape(acc.shape[0], acc.shape[1])
    acc = _epilogue(acc, s, k, filters, vectors, EPS, RELU)
    y.store([n0, p0, q0, k0], acc.to(y.dtype).reshape(BOX_N, BOX_P, BOX_Q, acc.shape[1]))


@triton.jit
def _store_pixels(
    acc, residual, r_at, r_sk, y, y_at, y_sk, k0, is_pixel, filters, first, vectors,
    EPS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The epilogue of pixels at y_at and the filters from k0 of a group, and its store."""
    k = k0 + tl.arange(0, acc.shape[1])
    mask = is_pixel[:, None] & (k < filters)[None, :]
    k += first
    s = None
    if residual is not None:
        s = tl.load(residual + (r_at[:, None] + (k * r_sk)[None, :]), mask, 0.0)
    acc = _epilogue(acc, s, k[None, :], first + filters, vectors, EPS, RELU)
    tl.store(y + (y_at[:, None] + (k * y_sk)[None, :]), acc.to(y.dtype.element_ty), mask)


@triton.jit
def conv_affine_act_tma_kernel(
    x,
    w,
    residual,
    y,
    bias,
    bn_weight,
    bn_bias,
    mean,
    var,
    res_scale,
    res_shift,
    channels,
    filters,
    p_tiles,
    q_tiles,
    k_tiles,
    c_tiles,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = relu(BN(conv(x, w) + bias) + residual) on tiles moved by tensor descriptors.

    x is described as [N, H, 1, W, C], for stride 2 as its parities [N, H/2, 2, W/2, 2·C], so that
    for a filter tap (r, s) the input of a box of BOX_N × BOX_P × BOX_Q output pixels is a box too;
    what lies outside arrives as zero, which is the padding, and is dropped where y is stored. No
    pointer, mask or division an element. w is [K, R·S, C], residual and y [N, P, Q, K].
    Grid: one program per box of pixels and BLOCK_N filters, filters fastest, so that programs that
    run together share the input in L2.
    Bytes moved: x from memory once (its R·S·K/BLOCK_N readings hit L2), w, residual and y once.
    """
    pid = tl.program_id(0)
    k0 = pid % k_tiles * BLOCK_N
    box = pid // k_tiles
    q0 = box % q_tiles * BOX_Q
    p0 = box // q_tiles % p_tiles * BOX_P
    n0 = box // q_tiles // p_tiles * BOX_N
    BLOCK_M: tl.constexpr = BOX_N * BOX_P * BOX_Q

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(R * S * c_tiles):
        tap = i // c_tiles
        c0 = i % c_tiles * BLOCK_K
        h = tap // S * DILATION_H - PAD_H
        v = tap % S * DILATION_W - PAD_W
        if STRIDE == 1:
            a = x.load([n0, p0 + h, 0, q0 + v, c0])
        else:
            a = x.load([n0, p0 + (h >> 1), h & 1, q0 + (v >> 1), (v & 1) * channels + c0])
        b = w.load([k0, tap, c0])
        a, b = a.reshape(BLOCK_M, BLOCK_K), b.reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    vectors = (bias, bn_weight, bn_bias, mean, var, res_scale, res_shift)
    QUARTER: tl.constexpr = BLOCK_N // 4
    if BLOCK_N == 256:
        left, right = _halves(acc)
        a, b = _halves(left)
        c, d = _halves(right)
        _store_box(a, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
        k0 += QUARTER
        _store_box(b, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
        k0 += QUARTER
        _store_box(c, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
        k0 += QUARTER
        _store_box(d, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
    elif BLOCK_N == 128:
        a, b = _halves(acc)
        _store_box(a, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
        k0 += BLOCK_N // 2
        _store_box(b, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q)
    else:
        _store_box(
            acc, residual, y, n0, p0, q0, k0, filters, vectors, EPS, RELU, BOX_N, BOX_P, BOX_Q
        )


@triton.jit
def conv_affine_act_kernel(
    x,
    w,
    residual,
    y,
    bias,
    bn_weight,
    bn_bias,
    mean,
    var,
    res_scale,
    res_shift,
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
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = relu(BN(conv(x, w) + bias) + residual) by gathers: any strides, geometry, dtype, groups.

    channels and filters are those of one group. FLAT_CHANNELS, their number when there are few (the
    stem has 3), walks GEMM_K = R·S·C without a break; at 0 a step is BLOCK_K channels of one
    filter tap, whose pixels are one vector of offsets.
    Grid: axis 0 one program per BLOCK_M output pixels and BLOCK_N filters, filters fastest; axis 1
    the groups. Bytes moved: as the descriptor kernel's; masks and offsets are what it costs more.
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
    pixel = n * x_sn + h0.to(tl.int64) * x_sh + v0.to(tl.int64) * x_sw
    is_pixel, is_filter = m < pixels, k < filters

    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    if FLAT_CHANNELS > 0:
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
        for i in range(R * S * c_tiles):
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

    vectors = (bias, bn_weight, bn_bias, mean, var, res_scale, res_shift)
    r_at, y_at = n * r_sn + p * r_sp + q * r_sq, n * y_sn + p * y_sp + q * y_sq
    k0, first = pid % k_tiles * BLOCK_N, group * filters
    if BLOCK_N == 128:
        a, b = _halves(acc)
        _store_pixels(
            a, residual, r_at, r_sk, y, y_at, y_sk, k0, is_pixel, filters, first, vectors, EPS, RELU
        )
        k0 += BLOCK_N // 2
        _store_pixels(
            b, residual, r_at, r_sk, y, y_at, y_sk, k0, is_pixel, filters, first, vectors, EPS, RELU
        )
    else:
        _store_pixels(
            acc, residual, r_at, r_sk, y, y_at, y_sk, k0, is_pixel, filters, first, vectors, EPS,
            RELU,
        )  # fmt: skip


class Epilogue(NamedTuple):
    """What follows the convolution, y = relu(BN(z + bias) + res_scale·residual + res_shift)."""

    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    res_scale: Tensor | None = None
    res_shift: Tensor | None = None
    relu: bool = True


def refuse_tma(x: Tensor, w: Tensor, conv: Conv, residual: Tensor | None = None) -> str | None:
    """Why the descriptor kernel cannot run this convolution; None when it can."""
    if not target(x).has_tma:
        return "the GPU has no tensor descriptors (sm_90 and later)"
    if x.dtype == torch.float64:
        return "descriptors carry no fp64"
    if x.dtype == torch.float32 and precision(x) == "ieee":
        return "fp32 without tf32 multiplies on CUDA cores"
    if conv.groups != 1:
        return "groups"
    if any(memory_format(t) != torch.channels_last and not flat(t) for t in (x, w)):
        return "NCHW"
    size = x.element_size()
    if w.size(1) * size % 16 or w.size(0) * size % 16:
        return "channels or filters are no multiple of 16 bytes"
    if any(t is not None and t.data_ptr() % 16 for t in (x, w, residual)):
        return "a tensor does not start at a multiple of 16 bytes"
    if conv.stride == (2, 2):
        if x.size(2) % 2 or x.size(3) % 2 or w.size(1) * size % 128:
            return "stride 2 over an odd size, or channels that are no multiple of 128 bytes"
    elif conv.stride != (1, 1):
        return f"stride {conv.stride}"
    return None


def flat(x: Tensor) -> bool:
    """Whether dense x is NHWC whatever its strides say: one channel, or one pixel an image."""
    return x.size(1) == 1 or x.size(2) * x.size(3) == 1


def precision(x: Tensor) -> str:
    """How fp32 is multiplied: "tf32" only where `torch.backends.cudnn` allows it."""
    exact = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return "ieee" if exact or x.dtype == torch.float64 else "tf32"


def box_of(block_m: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """Sides (powers of two, product `block_m`) of the box that covers N × P × Q in fewest boxes.

    Of equals the one whose rows are longest: 56 = 7·8, 28 = 7·4, 14 = 7·2 leave nothing over.
    """
    powers = [1 << i for i in range(block_m.bit_length())]
    boxes = [(block_m // (bp * bq), bp, bq) for bq in powers for bp in powers if bp * bq <= block_m]

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        count = triton.cdiv(n, box[0]) * triton.cdiv(p, box[1]) * triton.cdiv(q, box[2])
        return count, -box[2], -box[1]

    return min((box for box in boxes if max(box) <= 256), key=cost)


def eligible(configs: Configs, filters: int, shared: int) -> Configs:
    """Those of `configs` no wider than the filters need, whose stages fit in `shared` bytes."""
    narrowest = min(config[1] for config in configs)
    width = max(narrowest, triton.next_power_of_2(filters))
    return tuple(
        config
        for config in configs
        if config[1] <= width and (config[0] + config[1]) * config[2] * 2 * config[4] <= shared
    )


def pick(configs: Configs, pixels: int, filters: int, processors: int) -> int:
    """The rule: the first tile whose grid fills the GPU, else the last, which is the smallest."""
    for i, config in enumerate(configs):
        if triton.cdiv(pixels, config[0]) * triton.cdiv(filters, config[1]) >= processors:
            return i
    return len(configs) - 1


def conv_affine_act(
    x: Tensor, w: Tensor, conv: Conv, epilogue: Epilogue, tma: bool | None = None
) -> Tensor:
    """y = relu(BN(conv(x, w) + bias) + res_scale·residual + res_shift) in one launch.

    x [N,C,H,W] and w [K,C/groups,R,S] of one dtype, y [N,K,P,Q] in x's format; channel vectors
    [K], any float dtype. tma: by descriptors or by pointers; None is descriptors where they can.
    Raises ValueError when descriptors are asked for and cannot be had.
    Equation: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1; He et al. 2015, eq. 1.
    """
    fmt = memory_format(x, w)
    r, s = w.size(2), w.size(3)
    p, q = conv.output_size(x.size(2), r, 0), conv.output_size(x.size(3), s, 1)
    y = torch.empty((x.size(0), w.size(0), p, q), dtype=x.dtype, device=x.device, memory_format=fmt)
    if y.numel() == 0:
        return y
    if fmt == torch.channels_last:
        w = w.contiguous(memory_format=fmt)
    refusal = refuse_tma(x, w, conv, epilogue.residual)
    if tma and refusal is not None:
        raise ValueError(f"tma: {refusal}")
    run = _by_pointers if refusal is not None or tma is False else _by_descriptors
    run(x, w, conv, epilogue, y)
    return y


def _vectors(e: Epilogue) -> tuple[Tensor | None, ...]:
    return e.bias, e.bn_weight, e.bn_bias, e.mean, e.var, e.res_scale, e.res_shift


def _key(x: Tensor, w: Tensor, conv: Conv, e: Epilogue) -> tuple[Any, ...]:
    shape = "x".join(map(str, x.shape))
    filters = "x".join(map(str, w.shape))
    kind = "+residual" if e.residual is not None else "plain"
    return shape, filters, conv.stride[0], kind, x.dtype, precision(x)


def _by_descriptors(x: Tensor, w: Tensor, conv: Conv, e: Epilogue, y: Tensor) -> None:
    n, c, h, width = x.shape
    k, _, r, s = w.shape
    p, q = y.shape[2:]
    stride = conv.stride[0]
    if r * s == stride == 1 and conv.padding == (0, 0):  # a plain GEMM: pixels of all images
        n, h, width, p, q = 1, 1, n * h * width, 1, n * p * q

    def start(config: tuple[int, ...]) -> None:
        block_m, block_n, block_k, warps, stages = config
        block_k = block_k * 2 // x.element_size()
        box_n, box_p, box_q = box = box_of(block_m, n, p, q)
        row, image = width * c, h * width * c
        if stride == 1:
            shape, strides = [n, h, 1, width, c], [image, row, row, c, 1]
        else:
            shape = [n, h // 2, 2, width // 2, 2 * c]
            strides = [image, 2 * row, row, 2 * c, 1]
        x_tiles = TensorDescriptor(x, shape, strides, [box_n, box_p, 1, box_q, block_k])
        w_tiles = TensorDescriptor(w, [k, r * s, c], [r * s * c, c, 1], [block_n, 1, block_k])
        out_shape, out_strides = [n, p, q, k], [p * q * k, q * k, k, 1]
        y_tiles = TensorDescriptor(y, out_shape, out_strides, [*box, min(block_n, STORE_N)])
        residual = None
        if e.residual is not None:
            residual = TensorDescriptor(
                e.residual, out_shape, out_strides, [*box, min(block_n, STORE_N)]
            )
        grid = [triton.cdiv(*pair) for pair in ((n, box_n), (p, box_p), (q, box_q), (k, block_n))]
        launch(
            conv_affine_act_tma_kernel, (grid[0] * grid[1] * grid[2] * grid[3],),
            x_tiles, w_tiles, residual, y_tiles, *_vectors(e), c, k, grid[1], grid[2], grid[3],
            triton.cdiv(c, block_k), r, s, stride, *conv.padding, *conv.dilation, e.eps, e.relu,
            precision(x), *box, block_n, block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    gpu = target(x)
    # 256 columns and a residual are more registers than a thread has on sm_100, and all on sm_90.
    configs = eligible(CONFIGS[1:] if e.residual is not None else CONFIGS, k, gpu.shared)
    rule = pick(configs, n * p * q, k, gpu.multiprocessors)
    tiles.run("conv_affine_act_tma", _key(x, w, conv, e), configs, rule, x, start)


def _by_pointers(x: Tensor, w: Tensor, conv: Conv, e: Epilogue, y: Tensor) -> None:
    n, c, h, width = x.shape
    channels, filters = w.size(1), w.size(0) // conv.groups
    r, s = w.shape[2:]
    p, q = y.shape[2:]
    pixels = n * p * q
    if max(pixels, c * h * width, w.size(0) * p * q) >= 2**31 - 512:
        raise ValueError("x: expected fewer than 2^31 output pixels and values an image")
    residual = y if e.residual is None else e.residual
    flat_channels = channels if channels < 16 else 0
    if x.dtype == torch.float64:
        configs = DOUBLE_CONFIGS
    elif precision(x) == "ieee":
        configs = IEEE_CONFIGS
    else:
        configs = FLAT_CONFIGS if flat_channels else POINTER_CONFIGS

    def start(config: tuple[int, ...]) -> None:
        block_m, block_n, block_k, warps, stages = config
        block_k = block_k * 2 // x.element_size()
        if not flat_channels:
            block_k = min(block_k, max(16, triton.next_power_of_2(channels)))
        k_tiles = triton.cdiv(filters, block_n)
        launch(
            conv_affine_act_kernel, (triton.cdiv(pixels, block_m) * k_tiles, conv.groups),
            x, w, e.residual, y, *_vectors(e), *x.stride(), *w.stride(), *residual.stride(),
            *y.stride(), h, width, p, q, pixels, channels, filters, k_tiles, r, s, *conv.stride,
            *conv.padding, *conv.dilation, e.eps, e.relu,
            precision(x), flat_channels, block_m, block_n, block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    gpu = target(x)
    configs = eligible(configs, filters, gpu.shared)
    rule = pick(configs, pixels, filters, gpu.multiprocessors)
    tiles.run("conv_affine_act", _key(x, w, conv, e), configs, rule, x, start)


def conv_bn_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`reference.conv_bn_act` in one launch (two when the filters are wider than x)."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    epilogue = Epilogue(
        bias, bn_weight, bn_bias, running_mean, running_var, eps, residual, relu=relu
    )
    return conv_affine_act(x, w.to(x.dtype), conv, epilogue)
