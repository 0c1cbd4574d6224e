"""Tiles of a convolution in NHWC, moved by tensor descriptors or gathered by pointers.

A tile is a box of BOX_N × BOX_P × BOX_Q output pixels; for a filter tap its input is a box too.
Input-like tensors are walked as [N, H, 1, W, C], for stride 2 by their parities as
[N, H/2, 2, W/2, 2·C], and output-like ones as [N, P, Q, K]. Elements outside are loaded as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec.chain import Conv

Box = tuple[int, int, int]


def walk(
    x: Tensor, y: Tensor, w: Tensor, conv: Conv, flat: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[N,H,W,C] of x and [N,P,Q,K] of y as kernels walk them.

    A plain GEMM (1x1, stride 1, no padding) is one image with one row, the pixels of all images, if
    `flat`: if no other input has strides.
    """
    (n, c, h, width), (_, k, p, q) = x.shape, y.shape
    plain = w.size(2) * w.size(3) == 1 and conv.stride == (1, 1) and conv.padding == (0, 0)
    if plain and flat:
        return (1, 1, n * h * width, c), (1, 1, n * p * q, k)
    return (n, h, width, c), (n, p, q, k)


def input_tiles(
    t: Tensor, shape: tuple[int, ...], stride: int, box: Box, width: int
) -> TensorDescriptor:
    """Boxes of `width` channels of an input-like tensor of `shape` [N,H,W,C]."""
    n, h, w, c = shape
    row, image = w * c, h * w * c
    sides = [box[0], box[1], 1, box[2], width]
    if stride == 1:
        return TensorDescriptor(t, [n, h, 1, w, c], [image, row, row, c, 1], sides)
    parities = [n, h // 2, 2, w // 2, 2 * c]
    return TensorDescriptor(t, parities, [image, 2 * row, row, 2 * c, 1], sides)


def output_tiles(t: Tensor, shape: tuple[int, ...], box: Box, width: int) -> TensorDescriptor:
    """Boxes of `width` filters of an output-like tensor of `shape` [N,P,Q,K]."""
    n, p, q, k = shape
    return TensorDescriptor(t, [n, p, q, k], [p * q * k, q * k, k, 1], [*box, width])


def filter_tiles(w: Tensor, filters: int, channels: int) -> TensorDescriptor:
    """Tiles of `filters` × `channels` of one tap of w, [K,R,S,C] in memory."""
    k, c, r, s = w.shape
    return TensorDescriptor(w, [k, r * s, c], [r * s * c, c, 1], [filters, 1, channels])


@triton.jit
def operands(
    x, w, n0, p0, q0, k0, tap, c0, channels, S: tl.constexpr, STRIDE: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A step of a forward convolution: the input [M, BLOCK_K] and the filters [N, BLOCK_K] of `tap`
    and channels from c0, by descriptors.
    """
    h = tap // S * DILATION_H - PAD_H
    v = tap % S * DILATION_W - PAD_W
    if STRIDE == 1:
        a = x.load([n0, p0 + h, 0, q0 + v, c0])
    else:
        a = x.load([n0, p0 + (h >> 1), h & 1, q0 + (v >> 1), (v & 1) * channels + c0])
    b = w.load([k0, tap, c0])
    return a.reshape(M, BLOCK_K), b.reshape(N, BLOCK_K)


@triton.jit
def load_input(
    src, n0, i0, parity, j0, first, pixel, channel, channels, inside, TMA: tl.constexpr,
    M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[M, WIDTH] of an input-like tensor: a box, or `pixel` [M, 1] × `channel` [1, WIDTH]."""
    if TMA:
        return src.load([n0, i0, parity, j0, first]).reshape(M, WIDTH)
    else:
        return tl.load(src + (pixel * channels + channel), inside & (channel < channels), 0.0)


@triton.jit
def load_output(
    src, n0, p0, q0, first, pixel, channel, channels, inside, TMA: tl.constexpr,
    M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[M, WIDTH] of an output-like tensor: a box, or `pixel` [M, 1] × `channel` [1, WIDTH]."""
    if TMA:
        return src.load([n0, p0, q0, first]).reshape(M, WIDTH)
    else:
        return tl.load(src + (pixel * channels + channel), inside & (channel < channels), 0.0)
