"""Ops by calls of others, for implementations that have no kernel for the whole.

They finalize the moments or sums of every norm, which takes microseconds, also where the caller
merges those of several processes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .dtypes import stats_dtype
from .layout import memory_format, values_per_channel

Op = Callable[..., Any]


def conv_add_projection(conv_bn_act: Op, *args: Any) -> Tensor:
    """`reference.conv_add_projection(*args)` by two calls of `conv_bn_act` with folded norms."""
    x, w, scale, shift, source, source_w, source_scale, source_shift, relu = args[:9]
    *geometry, source_stride = args[9:]
    norm = None, source_scale, source_shift, None, None
    pointwise = source_stride, [0, 0], [1, 1], 1
    skip = conv_bn_act(source, source_w, *norm, None, False, 0.0, *pointwise)
    skip = skip.contiguous(memory_format=memory_format(x, w))
    norm = None, scale, shift, None, None
    return conv_bn_act(x, w, *norm, skip, relu, 0.0, *geometry)


@contextmanager
def _errors_of(part: str, op: str) -> Iterator[None]:
    """Errors of `part` call it `op`, whose argument is wrong."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        raise type(error)(str(error).replace(f"{part}:", f"{op}:", 1)) from None


def conv_fprop(conv: Op, bn_finalize: Op, *args: Any) -> tuple[Tensor, ...]:
    """`reference.conv_fprop(*args)` by `conv`, which takes no norm, and `bn_finalize`."""
    *inputs, stats, weight, bias, eps, residual, relu, stride, padding, dilation, groups = args
    own = None if stats else bias
    z, *moments = conv(*inputs, stats, stride, padding, dilation, groups, own, residual, relu)
    if not stats:
        return z, *moments, *(moments[0].new_empty(0) for _ in range(3))
    with _errors_of("bn_finalize", "conv_fprop"):
        return z, *moments, *bn_finalize(*moments, values_per_channel(z), weight, bias, eps)


def conv_bprop(conv: Op, bn_bwd_finalize: Op, *args: Any) -> tuple[Tensor, ...]:
    """`reference.conv_bprop(*args)` by `conv`, which gives no b and c, and `bn_bwd_finalize`.

    `conv` gives dw in the dtype of w.
    """
    dy, w, x, *rest, wide_dw = args
    in_scale, in_mean, in_rstd, need_dx = args[9], args[11], args[12], args[20]
    *grads, total, xhat = conv(dy, w.to(stats_dtype(x)) if wide_dw else w, x, *rest)
    if not need_dx or in_mean is None:
        return *grads, total, xhat, total.new_empty(0), total.new_empty(0)
    b_c = bn_bwd_finalize(total, xhat, in_scale, in_rstd, values_per_channel(x))
    return *grads, total, xhat, *b_c


def bn_act_bwd_reduce(reduce: Op, bn_bwd_finalize: Op, *args: Any) -> tuple[Tensor, ...]:
    """`reference.bn_act_bwd_reduce` by `reduce`, which gives only sums, and `bn_bwd_finalize`."""
    dy, mask, z, mean, rstd, scale, residual, res_mean, res_rstd, res_scale = args
    if residual is not None and res_scale is None:
        raise ValueError("bn_act_bwd_reduce: res_scale: expected a tensor together with residual")
    total, xhat, res_xhat = reduce(dy, mask, z, mean, rstd, residual, res_mean, res_rstd)
    count = values_per_channel(dy)
    with _errors_of("bn_bwd_finalize", "bn_act_bwd_reduce"):
        b_c = bn_bwd_finalize(total, xhat, scale, rstd, count)
        if residual is None:
            return total, xhat, *b_c, res_xhat, res_xhat.clone(), res_xhat.clone()
        res_b_c = bn_bwd_finalize(total, res_xhat, res_scale, res_rstd, count)
    return total, xhat, *b_c, res_xhat, *res_b_c
