"""Global average pooling: the mean of each channel of each image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import config_select
from .config_select import Config
from .launch import launch
from .sizes import cdiv
from .tile_math import sum_rows, widen

CONFIGS = ((32, 2), (64, 2), (64, 4))  # channels per tile, warps
BLOCK_P = 32


@triton.jit
def global_avg_pool_kernel(
    x,
    y,
    x_sn,
    x_sc,
    x_sp,
    channels,
    pixels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[n, c] = Σ over pixels of x[n, c] / (H·W).

    Grid: one program per image and BLOCK_C channels; it walks the image's pixels BLOCK_P at a
    time. Bytes moved: x once, y once.
    Why: the batch alone fills a GPU, so the pixels are not split.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_P, BLOCK_C), wide)
    for p0 in range(0, pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < pixels) & (c < channels)
        total += widen(tl.load(x + n * x_sn + (p * x_sp + c * x_sc), inside, 0.0))
    mean = sum_rows(total) / (tl.full((), 0.0, wide) + pixels)
    tl.store(y + n * channels + c, mean.to(y.dtype.element_ty), c < channels)


def global_avg_pool(x: Tensor) -> Tensor:
    """`reference.global_avg_pool` in one kernel launch; x is dense in NCHW or channels_last."""
    n, channels, height, width = x.shape
    y = x.new_empty(n, channels)
    if y.numel() == 0:
        return y

    def start(config: Config) -> None:
        block_c, warps = config
        launch(
            global_avg_pool_kernel, (n, cdiv(channels, block_c)),
            x, y, x.stride(0), x.stride(1), x.stride(3), channels, height * width, BLOCK_P,
            block_c, num_warps=warps,
        )  # fmt: skip

    key = *x.shape, x.stride(1) == 1, x.dtype
    start(config_select.choose("global_avg_pool", key, CONFIGS, 0, x, start))
    return y
