"""A GPU without a GPU: all that happens on the host for one, with a CUDA build of PyTorch.

`runtime.cpp` stands for CUDA; `install` stands for cuDNN, whose convolutions become memory and a
launch that is counted. Kernels do not run, so nothing is known of values or of their time. What is
known: whether every call comes as far as its launches, what those are and break no rule of CUDA's,
and what they cost the host. `make dry-gpu` runs the GPU tests (`plugin`), `bench host`
and `bench gpu` (`untimed`) this way.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

_library = torch.library.Library("aten", "IMPL")


def runtime() -> ctypes.CDLL:
    """The functions of `runtime.cpp` that tests ask; AttributeError where it is not loaded."""
    library = ctypes.CDLL(None)
    library.dry_name.restype = ctypes.c_char_p
    return library


def names() -> list[str]:
    """What was launched since `runtime().dry_reset()`, by the symbols of the kernels."""
    count = runtime().dry_launches()
    return [runtime().dry_name(ctypes.c_long(i)).decode() for i in range(count)]


def install() -> None:
    """Put the stand-ins for cuDNN in its place, once."""
    runtime().dry_launches()
    torch.backends.cudnn.enabled = False  # its batch normalization: PyTorch has kernels of its own
    for name, function in (
        ("convolution", _forward), ("convolution_backward", _backward),
        ("cudnn_convolution_relu", _relu), ("cudnn_convolution_add_relu", _add_relu),
    ):  # fmt: skip
        _library.impl(name, function, "CUDA")


def _forward(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
    shapes = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (x, w)]
    y = F.conv2d(*shapes, None, stride, padding, dilation, groups)
    last = any(t.stride(1) == 1 and t.size(1) > 1 for t in (x, w))
    fmt = torch.channels_last if last else torch.contiguous_format
    runtime().dry_launch(b"cuDNN forward")
    return torch.empty(y.shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def _relu(x, w, bias, stride, padding, dilation, groups):
    return _forward(x, w, bias, stride, padding, dilation, False, [0, 0], groups)


def _add_relu(x, w, z, alpha, bias, stride, padding, dilation, groups):
    y = _relu(x, w, bias, stride, padding, dilation, groups)
    assert z.shape == y.shape and z.dtype == bias.dtype == y.dtype
    return y


def _backward(
    dy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
):
    for name, asked in zip((b"cuDNN dgrad", b"cuDNN wgrad", b"bias gradient"), wanted, strict=True):
        if asked:
            runtime().dry_launch(name)
    return (
        torch.empty_like(x) if wanted[0] else None,
        torch.empty_like(w) if wanted[1] else None,
        dy.new_empty(bias_sizes) if wanted[2] else None,
    )
