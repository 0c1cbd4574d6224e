"""An op as two calls of another, for implementations without a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .layout import memory_format


def conv_add_projection(conv_bn_act: Callable[..., Tensor], *args: Any) -> Tensor:
    """`reference.conv_add_projection(*args)` by two calls of `conv_bn_act` with folded norms."""
    x, w, scale, shift, source, source_w, source_scale, source_shift, relu = args[:9]
    *geometry, source_stride = args[9:]
    norm = None, source_scale, source_shift, None, None
    pointwise = source_stride, [0, 0], [1, 1], 1
    skip = conv_bn_act(source, source_w, *norm, None, False, 0.0, *pointwise)
    skip = skip.contiguous(memory_format=memory_format(x, w))
    norm = None, scale, shift, None, None
    return conv_bn_act(x, w, *norm, skip, relu, 0.0, *geometry)
