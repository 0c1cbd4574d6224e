"""Memory formats: which one a tensor has, and the rows that a kernel reads.

There are two dense formats: `torch.contiguous_format` (NCHW) and `torch.channels_last` (NHWC). A
tensor with one channel or one pixel is dense in both. Kernels then read it as NHWC, and a
convolution follows the format of its filters, as in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether kernels read dense 4-D `x` as NHWC: true if both formats fit, false if empty."""
    return x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor, weight: Tensor | None = None) -> torch.memory_format:
    """The format of results that are computed from activations `x`.

    Unambiguous tensors keep their own. Ambiguous ones (C = 1 or H = W = 1) follow `weight`; with
    C = 1, strides decide, as in PyTorch: `.to(memory_format=torch.channels_last)` sets them. A
    tensor dense in neither (sliced, expanded) is NHWC when its channel stride is the least.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    contiguous = x.is_contiguous()
    if channels_last != contiguous:
        return torch.channels_last if channels_last else torch.contiguous_format
    if contiguous:
        follows = weight is not None and memory_format(weight) == torch.channels_last
        one = x.size(1) == x.stride(1) == 1 < x.size(2) * x.size(3)
        return torch.channels_last if follows or one else torch.contiguous_format
    least = x.size(1) > 1 and x.stride(1) == 1 and x.stride(3) > 1
    return torch.channels_last if least else torch.contiguous_format


def call_format(x: Tensor, weight: Tensor | None) -> torch.memory_format:
    """The format in which a chain runs on `x`: channels_last if `x` or its first filter has it.

    So does `torch.nn.functional.conv2d`: a channels_last model takes NCHW images. Only strides tell
    the format of 1x1 filters.
    """
    if weight is None:
        return memory_format(x)
    single = weight.size(2) == weight.size(3) == 1 < weight.size(1) == weight.stride(3)
    own = torch.channels_last if single else memory_format(weight)
    return own if own == torch.channels_last else memory_format(x, weight)


def rows_of(x: Tensor) -> tuple[int, int]:
    """(rows, elements per row) of dense `x`: pixels × channels in NHWC, planes × pixels in NCHW."""
    n, c, h, w = x.shape
    return (n * h * w, c) if is_channels_last(x) else (n * c, h * w)


def values_per_channel(x: Tensor) -> int:
    """Number of values per channel of x [N,C,H,W]: N·H·W."""
    return x.size(0) * x.size(2) * x.size(3)


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the ReLU bit mask of dense `x`: one bit per element, each row padded to a byte."""
    rows, inner = rows_of(x)
    return rows, (inner + 7) // 8
