"""Few input channels, such as the 3 of a stem: each filter row as one tap of whole vectors.

A pixel of 3 channels has 6 bytes in bf16, which no vector load fits, and GEMM_K = R·S·3 has no
tile. Padded to 4 channels, the S pixels under a filter row are one run of contiguous values. They
are the channels of a convolution with R × 1 taps, on a view of overlapping windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.chain import Conv
from .conv_plan import precision
from .launch import launch
from .sizes import cdiv, next_power_of_2

CHANNELS = 4  # of a padded pixel
VECTOR = 16  # bytes of a load


@triton.jit
def pad_pixels_kernel(
    x, out, x_sn, x_sc, x_sh, x_sw, channels, H, W, rows, top, left, width,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, h, w, c] = x[n, c, h − top, w − left], or zero outside x; out is [N, rows, width].

    width counts values, CHANNELS per pixel.
    Grid: one program per row of out and BLOCK of its values. Bytes moved: x once, out once.
    Why: one pass pads the image and its pixels, so that the convolution has no masks and its loads
    are aligned.
    """
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n, h = (row // rows).to(tl.int64), row % rows - top
    w, c = j // CHANNELS - left, j % CHANNELS
    end = tl.where((h >= 0) & (h < H), W, 0)
    inside = (w >= 0) & (w < end) & (c < channels)
    value = tl.load(x + n * x_sn + h.to(tl.int64) * x_sh + w * x_sw + c * x_sc, inside, 0.0)
    tl.store(out + row.to(tl.int64) * width + j, value, j < width)


def pad_pixels(x: Tensor, top: int, left: int, rows: int, columns: int) -> Tensor:
    """[N, rows, columns, CHANNELS] with x [N,C,H,W] at (top, left), zero elsewhere."""
    n, c, h, w = x.shape
    out = torch.empty(n, rows, columns, CHANNELS, dtype=x.dtype, device=x.device)
    width = columns * CHANNELS
    block = min(1024, next_power_of_2(width))
    launch(
        pad_pixels_kernel, (n * rows, cdiv(width, block)),
        x, out, *x.stride(), c, h, w, rows, top, left, width, CHANNELS, block, num_warps=4,
    )  # fmt: skip
    return out


def takes_windows(x: Tensor, w: Tensor, conv: Conv) -> bool:
    """Whether `as_windows` computes this convolution, with aligned loads.

    Not where CUDA cores multiply: they would take as long for the padding as for the pixels.
    """
    if precision(x) == "ieee":
        return False
    step = conv.stride[1] * CHANNELS * x.element_size()
    few = w.size(1) <= CHANNELS and conv.groups == 1 and conv.dilation == (1, 1)
    return few and w.size(3) > 1 and step % VECTOR == 0


def as_windows(x: Tensor, w: Tensor, conv: Conv) -> tuple[Tensor, Tensor, Conv]:
    """The same convolution on windows: x [N, S'·CHANNELS, H', Q], filters [K, S'·CHANNELS, R, 1].

    S' is the power of two from S. The view of x overlaps itself: do not write to it.
    """
    n, (k, _, r, s) = x.size(0), w.shape
    p, q = (conv.output_size(x.size(2 + i), w.size(2 + i), i) for i in (0, 1))
    taps = next_power_of_2(s)
    rows = conv.stride[0] * (p - 1) + r
    columns = cdiv(conv.stride[1] * (q - 1) + taps, 4) * 4
    padded = pad_pixels(x, *conv.padding, rows, columns)
    row, image = columns * CHANNELS, rows * columns * CHANNELS
    size, step = (n, taps * CHANNELS, rows, q), conv.stride[1] * CHANNELS
    windows = padded.as_strided(size, (image, 1, row, step))
    filters = pad_pixels(w, 0, 0, r, taps).view(k, r, 1, taps * CHANNELS).permute(0, 3, 1, 2)
    return windows, filters, Conv((conv.stride[0], 1))
