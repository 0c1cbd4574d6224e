"""Channel vectors: scale and shift from statistics, and their counterparts for the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .sizes import cdiv

BLOCK = 128


@triton.jit
def store_finalized(
    scale, shift, rstd, mean, m2, weight, bias, c, inside, count, EPS: tl.constexpr
):  # fmt: skip
    """Store scale, shift and rstd of channels c; mean and m2 are values, the others pointers."""
    var = m2.to(tl.float64) / (tl.full((), 0.0, tl.float64) + count)
    r = 1.0 / tl.sqrt(var + EPS)
    s = r
    if weight is not None:
        s *= tl.load(weight + c, inside, 0.0).to(tl.float64)
    s = s.to(scale.dtype.element_ty)
    t = -mean.to(tl.float64) * s.to(tl.float64)
    if bias is not None:
        t += tl.load(bias + c, inside, 0.0).to(tl.float64)
    tl.store(scale + c, s, inside)
    tl.store(shift + c, t.to(shift.dtype.element_ty), inside)
    tl.store(rstd + c, r.to(rstd.dtype.element_ty), inside)


@triton.jit
def share_of(total, scale, c, inside, count):
    """−scale·total/count of channels c in fp64; scale is a pointer."""
    a = -tl.load(scale + c, inside, 0.0).to(tl.float64) / (tl.full((), 0.0, tl.float64) + count)
    return a * total


@triton.jit
def bn_finalize_kernel(
    mean,
    m2,
    weight,
    bias,
    scale,
    shift,
    rstd,
    channels,
    count,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rstd = (m2/M + eps)^(−1/2), scale = weight·rstd, shift = bias − mean·scale.

    M is `count`. Terms whose argument is None are omitted.
    Grid: one program per BLOCK channels. Bytes moved: seven channel vectors.
    Why fp64: where |mean| is large, shift is a small difference of large terms. It is computed from
    scale as stored, that is, after rounding.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    own, spread = tl.load(mean + c, inside, 0.0), tl.load(m2 + c, inside, 0.0)
    store_finalized(scale, shift, rstd, own, spread, weight, bias, c, inside, count, EPS)


@triton.jit
def bn_bwd_finalize_kernel(
    sum_dy, sum_dy_xhat, scale, rstd, b, c, channels, count, BLOCK: tl.constexpr
):
    """b = −scale·rstd·Σdy·xhat/M, c = −scale·Σdy/M.

    M is `count`. Grid: one program per BLOCK channels. Bytes moved: six channel vectors.
    Why fp64: each result is rounded only once.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < channels
    x = tl.load(rstd + k, inside, 0.0).to(tl.float64) * tl.load(sum_dy_xhat + k, inside, 0.0)
    tl.store(b + k, share_of(x, scale, k, inside, count).to(b.dtype.element_ty), inside)
    own = share_of(tl.load(sum_dy + k, inside, 0.0), scale, k, inside, count)
    tl.store(c + k, own.to(c.dtype.element_ty), inside)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.bn_finalize` in one kernel launch."""
    scale, shift, rstd = (torch.empty_like(mean) for _ in range(3))
    channels = mean.numel()
    if channels:
        launch(
            bn_finalize_kernel, (cdiv(channels, BLOCK),),
            mean, m2, weight, bias, scale, shift, rstd, channels, max(count, 1), eps, BLOCK,
            num_warps=4,
        )  # fmt: skip
    return scale, shift, rstd


def bn_bwd_finalize(
    sum_dy: Tensor, sum_dy_xhat: Tensor, scale: Tensor, rstd: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`reference.bn_bwd_finalize` in one kernel launch."""
    b, c = torch.empty_like(sum_dy), torch.empty_like(sum_dy)
    channels = sum_dy.numel()
    if channels:
        launch(
            bn_bwd_finalize_kernel, (cdiv(channels, BLOCK),),
            sum_dy, sum_dy_xhat, scale, rstd, b, c, channels, max(count, 1), BLOCK, num_warps=4,
        )  # fmt: skip
    return b, c
