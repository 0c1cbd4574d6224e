"""Norms with running statistics as scale and shift, all of a call in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.dtypes import stats_dtype
from .launch import launch
from .sizes import cdiv

BLOCK = 128
MOST = 56  # norms per launch: kernel arguments are limited to 4 KB


@triton.jit
def _fold(
    bias, weight, shift, mean, var, scale_out, shift_out, channels, eps, BLOCK: tl.constexpr
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    centre = tl.zeros((BLOCK,), tl.float64)
    s = tl.full((BLOCK,), 1.0, tl.float64)
    if mean is not None:
        s /= tl.sqrt(tl.load(var + c, inside, 1.0).to(tl.float64) + eps)
        centre += tl.load(mean + c, inside, 0.0).to(tl.float64)
    if bias is not None:
        centre -= tl.load(bias + c, inside, 0.0).to(tl.float64)
    if weight is not None:
        s *= tl.load(weight + c, inside, 0.0).to(tl.float64)
    s = s.to(scale_out.dtype.element_ty)
    t = -centre * s.to(tl.float64)
    if shift is not None:
        t += tl.load(shift + c, inside, 0.0).to(tl.float64)
    tl.store(scale_out + c, s, inside)
    tl.store(shift_out + c, t.to(shift_out.dtype.element_ty), inside)


@triton.jit
def bn_fold_kernel(
    biases, weights, shifts, means, variances, scale_outs, shift_outs, channels,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale = weight/√(var + eps), shift = bn_bias − (mean − bias)·scale for each norm.

    Arguments are tuples with an entry per norm; terms whose entry is None are omitted.
    Grid: axis 0: blocks of BLOCK channels of the widest norm; axis 1: norms.
    Bytes moved: seven channel vectors per norm.
    Why: every thread of a convolution's epilogue would otherwise repeat the root and the division
    for its columns, at every tile. fp64 as in `bn_finalize_kernel`: |mean| may be large.
    """
    for i in tl.static_range(len(scale_outs)):
        if tl.program_id(1) == i:
            _fold(
                biases[i], weights[i], shifts[i], means[i], variances[i], scale_outs[i],
                shift_outs[i], channels[i], EPS[i], BLOCK,
            )  # fmt: skip


def bn_fold(x: Tensor, vectors: Sequence[Tensor | None], eps: Sequence[float]) -> list[Tensor]:
    """`reference.bn_fold`: scale and shift of every norm, in one kernel launch for up to MOST."""
    wide, results = stats_dtype(x), []
    for first in range(0, len(eps), MOST):
        rules = tuple(eps[first : first + MOST])
        given = [tuple(vectors[5 * first + i : 5 * (first + len(rules)) : 5]) for i in range(5)]
        channels = tuple(
            next(t.numel() for t in of_a_norm if t is not None)
            for of_a_norm in zip(*given, strict=True)
        )
        out = [
            tuple(torch.empty(size, dtype=wide, device=x.device) for size in channels)
            for _ in range(2)
        ]
        grid = cdiv(max(channels), BLOCK), len(rules)
        launch(bn_fold_kernel, grid, *given, *out, channels, rules, BLOCK, num_warps=4)
        results += [t for pair in zip(*out, strict=True) for t in pair]
    return results
