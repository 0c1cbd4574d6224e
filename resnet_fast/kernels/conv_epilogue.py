"""Epilogue of convolution kernels."""

import triton
import triton.language as tl

from .tile_math import relu, widen


@triton.jit
def affine(acc, k, filters, scale, shift):
    """scale·acc + shift; None arguments are omitted. k is [1, N]."""
    inside = k < filters
    if scale is not None and shift is not None:
        return tl.fma(acc, tl.load(scale + k, inside, 0.0), tl.load(shift + k, inside, 0.0))
    elif scale is not None:
        return acc * tl.load(scale + k, inside, 0.0)
    elif shift is not None:
        return acc + tl.load(shift + k, inside, 0.0)
    else:
        return acc


@triton.jit
def computed_here(x, INTERPRETED: tl.constexpr):
    """x of 16 bits, computed here: compilers would keep wider values in registers until its use."""
    if INTERPRETED or x.dtype.primitive_bitwidth != 16:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )


@triton.jit
def epilogue(acc, residual, k, filters, scale, shift, RELU: tl.constexpr):
    """relu(scale·acc + shift + residual); None arguments are omitted. k is [1, N]."""
    acc = affine(acc, k, filters, scale, shift)
    if residual is not None:
        acc += widen(residual)
    if RELU:
        acc = relu(acc)
    return acc


@triton.jit
def _halves(acc):
    return tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def columns(acc):
    """acc [M, N] as a tuple of parts of up to 64 columns.

    Their epilogues run one after another, because the channel vectors of all columns together do
    not fit into the registers.
    """
    if acc.shape[1] == 256:
        left, right = _halves(acc)
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d
    elif acc.shape[1] == 128:
        a, b = _halves(acc)
        return a, b
    else:
        return (acc,)
