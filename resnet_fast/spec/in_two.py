"""An op as two calls of another, for implementations without a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .layout import memory_format


def conv_add_projection(
    conv_bn_act: Callable[..., Tensor],
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
    """`reference.conv_add_projection` by two calls of `conv_bn_act` with folded norms."""
    norm = None, source_scale, source_shift, None, None
    pointwise = source_stride, [0, 0], [1, 1], 1
    skip = conv_bn_act(source, source_w, *norm, None, False, 0.0, *pointwise)
    skip = skip.contiguous(memory_format=memory_format(x, w))
    norm = None, scale, shift, None, None
    rest = relu, 0.0, stride, padding, dilation, groups
    return conv_bn_act(x, w, *norm, skip, *rest)
