"""Fused convolution in one kernel launch: implicit GEMM with an epilogue.

GEMM_M = N·P·Q output pixels, GEMM_N = K filters, GEMM_K = R·S·C. `conv_tma` moves tiles by tensor
descriptors, and so does `conv_moments`, which also sums batch statistics; `conv_gather` gathers by
pointers. When there are few output tiles, several programs share the GEMM_K of one tile
(`conv_split`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import in_two
from ..spec.chain import Conv
from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format
from . import config_select
from .bn_act import bn_act
from .bn_fold import bn_fold
from .config_select import Config
from .conv_gather import by_pointers
from .conv_moments import conv_moments
from .conv_plan import (
    CUDNN,
    FUSED,
    LIBRARY,
    Fusion,
    Source,
    forward_plans,
    key,
    projection_plans,
    refuse_tma,
)
from .conv_tma import by_descriptors


def conv_fused(
    x: Tensor, w: Tensor, conv: Conv, fusion: Fusion, tma: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """y = relu(scale·conv(x, w) + shift + residual) in one kernel launch.

    Equation: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1; He et al. 2015, eq. 1.

    Args:
        x: Input [N,C,H,W].
        w: Filters [K,C/groups,R,S] in the dtype of x.
        conv: Stride, padding, dilation and groups.
        fusion: What is fused. Channel vectors are [K].
        tma: True for tensor descriptors, False for pointers, None for descriptors where possible.

    Returns:
        y [N,K,P,Q] in the memory format of x, and with `fusion.stats` moments of parts of it for
        `reduce_partials.merge_tiles`, otherwise None.

    Raises:
        ValueError: `tma` is True or `fusion` has a source, and descriptors cannot be used; or
            `fusion` has both `stats` and something to apply to y.
    """
    applied = fusion.relu or any(t is not None for t in (*fusion[:3], fusion.source))
    if fusion.stats and applied:
        raise ValueError("fusion: expected no norm, residual or ReLU with stats")
    fmt = memory_format(x, w)
    r, s = w.size(2), w.size(3)
    p, q = conv.output_size(x.size(2), r, 0), conv.output_size(x.size(3), s, 1)
    y = torch.empty((x.size(0), w.size(0), p, q), dtype=x.dtype, device=x.device, memory_format=fmt)
    if y.numel() == 0:
        return y, None
    if fmt == torch.channels_last:
        w = w.contiguous(memory_format=fmt)
    refusal = refuse_tma(x, w, conv, fusion.residual)
    if tma and refusal is not None:
        raise ValueError(f"tma: expected None or False: descriptors cannot be used ({refusal})")
    if fusion.source is not None and (tma is False or refusal is not None):
        raise ValueError(f"fusion: a source needs descriptors ({refusal or 'tma=False'})")
    if refusal is not None or tma is False:
        return y, by_pointers(x, w, conv, fusion, y)
    if fusion.stats:
        return y, conv_moments(x, w, conv, y)
    by_descriptors(x, w, conv, fusion, y)
    return y, None


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
    """`reference.conv_bn_act` in one kernel launch if the norm is folded (`bn_fold`), else in two.

    A wider dtype of w takes one more. Where a tuning table, the rule of `forward_plans` or
    RESNET_FAST_TRITON_CONV chooses it, cuDNN convolves instead.
    """
    vectors = bias, bn_weight, bn_bias, running_mean, running_var
    scale, shift = _scale_and_shift(x, vectors, eps)
    fusion = Fusion(scale, shift, residual=residual, relu=relu)
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    filters = w.to(x.dtype)

    def start(plan: Config) -> Tensor:
        if plan == LIBRARY:
            return _by_library(x, filters, conv, fusion)
        if plan == CUDNN:
            return _by_cudnn(x, filters, conv, fusion)
        return conv_fused(x, filters, conv, fusion)[0]

    where = key(x, w, conv, fusion)
    plans, rule, why = forward_plans(x, filters, conv, fusion, training=False)
    return start(config_select.choose("conv_bn_act", where, plans, rule, x, start, why))


def conv_add_projection(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    source: Tensor,
    source_w: Tensor,
    source_scale: Tensor | None,
    source_shift: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    source_stride: list[int],
) -> Tensor:
    """`reference.conv_add_projection` in one kernel launch, or in two calls of `conv_bn_act`.

    A tuning table or the rule of `projection_plans` decides.
    """
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    w = w.to(x.dtype).contiguous(memory_format=memory_format(x, w))
    source_w = source_w.to(x.dtype).contiguous(memory_format=torch.channels_last)
    projection = Source(source, source_w, source_stride[0], source_scale, source_shift)
    fusion = Fusion(scale, shift, relu=relu, source=projection)

    def start(plan: Config) -> Tensor:
        if plan == FUSED:
            return conv_fused(x, w, conv, fusion)[0]
        return in_two.conv_add_projection(
            conv_bn_act, x, w, scale, shift, source, source_w, source_scale, source_shift, relu,
            stride, padding, dilation, groups, source_stride,
        )  # fmt: skip

    where = key(x, w, conv, fusion)
    plans, rule, why = projection_plans(x, w, conv, fusion, tuple(source_stride))
    return start(config_select.choose("conv_add_projection", where, plans, rule, x, start, why))


def _scale_and_shift(
    x: Tensor, vectors: tuple[Tensor | None, ...], eps: float
) -> Sequence[Tensor | None]:
    """The norm as scale and shift; (None, None) without any of its vectors."""
    bias, weight, shift, mean, _ = vectors
    if all(t is None for t in vectors):
        return None, None
    ready = bias is None and mean is None and weight is not None and shift is not None
    if ready and weight.dtype == shift.dtype == stats_dtype(x):
        return weight, shift
    return bn_fold(x, vectors, [eps])


def _by_cudnn(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> Tensor:
    """cuDNN's convolution with bias, addition and ReLU, on filters that include scale.

    cuDNN takes filters and bias in the dtype of x. The error of y grows to 1.1 to 1.6 times that of
    PyTorch's convolution and BatchNorm (256 channels, means of up to 2.7 standard deviations).
    """
    filters = (w * f.scale.view(-1, 1, 1, 1)).to(x.dtype, memory_format=torch.channels_last)
    shift = f.shift.to(x.dtype)
    if f.residual is None:
        return torch.cudnn_convolution_relu(x, filters, shift, *conv.args())
    return torch.cudnn_convolution_add_relu(x, filters, f.residual, 1.0, shift, *conv.args())


def _by_library(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> Tensor:
    """PyTorch's convolution, then normalization, addition and ReLU in one pass over its output."""
    z = F.conv2d(x, w, None, *conv.args()).contiguous(memory_format=memory_format(x, w))
    scale, shift = f.scale, f.shift
    if scale is None or shift is None:
        if f.residual is None and not f.relu:
            return z
        scale = torch.ones(w.size(0), dtype=stats_dtype(x), device=x.device)
        shift = torch.zeros_like(scale)
    return bn_act(z, scale, shift, f.residual, None, None, f.relu, False)[0]
